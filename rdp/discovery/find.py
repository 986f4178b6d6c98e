"""Finding the branches of a model: its residual sums, where their branches end, and which parameters they own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from rdp.branches import Branch, GatePoint, Refusal
from rdp.discovery import forwards
from rdp.discovery.candidates import Candidate, find_candidates
from rdp.discovery.forwards import Inputs
from rdp.discovery.graph import Graph
from rdp.discovery.ownership import parameters_by_branch
from rdp.discovery.residuals import find_residuals, without_side_inputs
from rdp.discovery.trace import Call, Trace
from rdp.discovery.weightless import on_meta, weightless


@dataclass(frozen=True)
class Discovery:
    """What a traced forward shows.

    Attributes:
        graph: The forward.
        candidates: The branches in forward order, with a reason where gating would be unsound.
        additions: Number of additions that were looked at.
        rejected: Why additions are no residual sums, and how many are none for that reason.
    """

    graph: Graph
    candidates: list[Candidate]
    additions: int
    rejected: Mapping[str, int]

    @property
    def accepted(self) -> list[Candidate]:
        """Those that can be gated."""
        return [candidate for candidate in self.candidates if candidate.reason is None]

    def refused(self) -> tuple[Refusal, ...]:
        """Residual sums that cannot be gated and are in no branch that is."""
        accepted = self.accepted
        return tuple(
            Refusal(c.name, _block(self.graph, c), c.reason)
            for c in self.candidates
            if c.reason is not None and not any(a.encloses(c) for a in accepted)
        )

    def branches(self) -> tuple[Branch, ...]:
        """Those that can be gated, in forward order; without rates, and it is not known where their rows are."""
        graph, accepted = self.graph, self.accepted
        parameters = parameters_by_branch(graph, [_ends(candidate) for candidate in accepted])
        groups = [_rate_group(graph, candidate) for candidate in accepted]
        depths = {group: depth for depth, group in enumerate(dict.fromkeys(groups))}
        branches = []
        for candidate, names, group in zip(accepted, parameters, groups, strict=True):
            sums = max(len(candidate.residuals), 1)
            notes = [f"{sums} sums share one module, and so one mask"] if sums > 1 else []
            notes += ["ambiguous"] if any(r.ambiguous for r in candidate.residuals) else []
            around = _innermost([i for i, c in enumerate(accepted) if c.encloses(candidate)], accepted)
            branches.append(
                Branch(
                    name=candidate.name,
                    block=_block(graph, candidate),
                    kind=candidate.kind,
                    parameters=tuple(names),
                    sums=sums,
                    depth=depths[group],
                    gates=_gate_points(candidate),
                    inside=around[0] if around else None,
                    idle="" if _has_gradients(graph, candidate) else "without gradients",
                    note=", ".join(notes),
                )
            )
        return tuple(branches)


def traced(model: nn.Module, *inputs: Inputs) -> Iterator[tuple[Graph, ...]]:
    """The forwards of these inputs, on `meta` if that can be, and then with numbers.

    The second is for those who find the first wrong, or empty: a model may choose by the values of its inputs what it
    does.
    """
    device = forwards.only_device(model)
    if device is not None and not torch.is_autocast_enabled(device.type):  # which does nothing on `meta`
        graphs = None
        # Whatever cannot be done without numbers is done with them.
        with suppress(Exception), weightless(model):
            graphs = tuple(Graph(Trace(model).run(*on_meta(each))) for each in inputs)
        if graphs is not None:
            yield graphs
    yield tuple(Graph(Trace(model).run(*each)) for each in inputs)


def find_branches(graph: Graph, model: nn.Module, named: Sequence[str] = ()) -> Discovery:
    """Find every residual branch in a forward of `model`; the user vouches for `named` ones, found or not."""
    residuals, rejected = find_residuals(graph)
    additions = len(residuals) + len(rejected)
    residuals, side_inputs = without_side_inputs(graph, residuals)
    reasons = Counter(rejection.reason for rejection in [*rejected, *side_inputs])
    return Discovery(graph, find_candidates(graph, model, residuals, named), additions, reasons)


def _gate_points(candidate: Candidate) -> tuple[GatePoint, ...]:
    points: dict[tuple[str, int], GatePoint] = {}
    for seam in candidate.seams:
        name, leaf = seam.call.name, seam.call.outputs.index(seam.value)
        points[name, leaf] = GatePoint(name, leaf, None, seam.zero_only, seam.of_block)
    return tuple(points.values())


def _owner(graph: Graph, candidate: Candidate) -> Call | None:
    if candidate.residuals:
        return graph.values[candidate.residuals[0].sum].owner
    return candidate.seams[0].call.parent


def _block(graph: Graph, candidate: Candidate) -> str:
    owner = _owner(graph, candidate)
    return owner.name if owner is not None else ""


def _has_gradients(graph: Graph, candidate: Candidate) -> bool:
    """Is it added where gradients are on?"""
    added = [value if total is None else total for total, value in _ends(candidate)]
    return any(graph.values[value].has_gradients for value in added)


def _ends(candidate: Candidate) -> list[tuple[int | None, int]]:
    """The sums that take in the branch, each with the value that it takes in; None where the sum is not known."""
    return [(r.sum, r.branch) for r in candidate.residuals] or [(None, seam.value) for seam in candidate.seams]


def _innermost(inside: list[int], accepted: list[Candidate]) -> list[int]:
    """Of the candidates `inside` which something lies, those that enclose none of the others."""
    return [i for i in inside if not any(accepted[i].encloses(accepted[j]) for j in inside)]


def _rate_group(graph: Graph, candidate: Candidate) -> str:
    """What shares a drop rate: the adding module or, where it loops over a list of modules, the item of that list."""
    owner = _owner(graph, candidate)
    prefix = f"{owner.name}." if owner is not None and owner.name else ""
    parts = candidate.name.removeprefix(prefix).split(".") if candidate.name.startswith(prefix) else []
    for position in range(1, len(parts)):
        container = prefix + ".".join(parts[:position])
        if graph.trace.count[container] == 0 and parts[position].isdigit():  # a list is never called itself
            return f"{container}.{parts[position]}"
    return f"{owner.name}#{owner.ordinal}" if owner is not None else ""
