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
from rdp.discovery.nesting import Nesting
from rdp.discovery.ownership import parameters_by_branch
from rdp.discovery.records import Call
from rdp.discovery.residuals import Rejection, find_residuals, passed_over, without_side_inputs
from rdp.discovery.trace import Trace
from rdp.discovery.weightless import on_meta, weightless
from rdp.errors import RdpError
from rdp.inputs import fresh


@dataclass(frozen=True)
class Discovery:
    """What a traced forward shows.

    Attributes:
        graph: The forward.
        candidates: The branches in forward order, with a reason where gating would be unsound.
        additions: Number of additions that were looked at.
        rejected: Why additions are no residual sums, and how many are none for that reason.
        passed_over: Those of them that are in the midst of a residual stream.
    """

    graph: Graph
    candidates: list[Candidate]
    additions: int
    rejected: Mapping[str, int]
    passed_over: Sequence[Rejection] = ()

    @property
    def accepted(self) -> list[Candidate]:
        """Those that can be gated."""
        return [candidate for candidate in self.candidates if candidate.reason is None]

    def refused(self) -> tuple[Refusal, ...]:
        """Sums of residual streams that cannot be gated and are in no branch that is."""
        nesting = Nesting(self.graph, [c.ends(self.graph) for c in self.accepted])
        unsound = [
            Refusal(c.name, _block(self.graph, c), c.reason)
            for c in self.candidates
            if c.reason is not None and not all(nesting.is_inside(r.sum) for r in c.residuals)
        ]
        doubtful = [
            Refusal("", r.block, f"a sum in the midst of the residual stream is none by itself, as {r.reason}")
            for r in self.passed_over
            if not nesting.is_inside(r.sum)
        ]
        return (*unsound, *doubtful)

    def branches(self, chosen: Sequence[Candidate] | None = None) -> tuple[Branch, ...]:
        """Those that are gated, in forward order; without rates, and it is not known where their rows are.

        Args:
            chosen: Of the accepted ones, those that are; None: all.
        """
        graph, chosen = self.graph, self.accepted if chosen is None else chosen
        ends = [candidate.ends(graph) for candidate in chosen]
        nesting, parameters = Nesting(graph, ends), parameters_by_branch(graph, ends)
        groups = dict.fromkeys(_rate_group(graph, candidate) for candidate in self.accepted)
        depths = {group: depth for depth, group in enumerate(groups)}
        branches = []
        for candidate, names, around in zip(chosen, parameters, nesting.around, strict=True):
            sums = max(len(candidate.residuals), 1)
            notes = [f"{sums} sums share one module, and so one mask"] if sums > 1 else []
            notes += [candidate.note] if candidate.note else []
            notes += ["ambiguous"] if any(r.ambiguous for r in candidate.residuals) else []
            branches.append(
                Branch(
                    name=candidate.name,
                    block=_block(graph, candidate),
                    kind=candidate.kind,
                    parameters=tuple(names),
                    sums=sums,
                    depth=depths[_rate_group(graph, candidate)],
                    gates=_gate_points(candidate),
                    inside=around,
                    idle="" if _has_gradients(graph, candidate) else "without gradients",
                    note=", ".join(notes),
                )
            )
        return tuple(branches)


def traced(model: nn.Module, *inputs: Inputs) -> Iterator[tuple[Graph, ...]]:
    """The forwards of these inputs, on `meta` if that can be, and then with numbers.

    The second is for those who find the first wrong, or empty: a model may choose by the values of its inputs what it
    does. It is made as in training where it cannot be made in eval mode.
    """
    device = forwards.only_device(model)
    if device is not None and not torch.is_autocast_enabled(device.type):  # which does nothing on `meta`
        graphs = None
        # Whatever cannot be done without numbers is done with them.
        with suppress(Exception), weightless(model):
            graphs = tuple(Graph(Trace(model).run(*on_meta(each))) for each in inputs)
        if graphs is not None:
            yield graphs
    try:
        graphs = tuple(Graph(Trace(model).run(*fresh(each))) for each in inputs)
    except RdpError:
        raise
    except Exception:
        with forwards.as_in_training(model):
            graphs = tuple(Graph(Trace(model).run(*fresh(each))) for each in inputs)
    yield graphs


def find_branches(graph: Graph, model: nn.Module, named: Sequence[str] = (), stops: bool = True) -> Discovery:
    """Find every residual branch in a forward of a model.

    Args:
        graph: The forward.
        model: The model.
        named: Modules that the user vouches for, found or not.
        stops: Must gradients be stopped, as FREEZE does? Else, what a branch is multiplied by is of no interest.
    """
    residuals, rejected = find_residuals(graph)
    additions = len(residuals) + len(rejected)
    residuals, side_inputs = without_side_inputs(graph, residuals)
    reasons = Counter(rejection.reason for rejection in [*rejected, *side_inputs])
    candidates = find_candidates(graph, model, residuals, named, stops)
    return Discovery(graph, candidates, additions, reasons, passed_over(graph, residuals, rejected))


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
    added = [value if total is None else total for total, value in candidate.ends(graph)]
    return any(graph.values[value].has_gradients for value in added)


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
