"""Finding the branches of a model: its residual sums, where their branches end, and which parameters they own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rdp.branches import Branch, GatePoint, Refusal
from rdp.discovery import forwards
from rdp.discovery.candidates import Candidate, find_candidates
from rdp.discovery.forwards import Inputs
from rdp.discovery.graph import Graph
from rdp.discovery.ownership import parameters_by_branch
from rdp.discovery.program import Program, draws_random_numbers
from rdp.discovery.residuals import find_residuals, without_side_inputs
from rdp.discovery.row_axes import first_coupled, row_axis
from rdp.discovery.trace import Call, Trace
from rdp.discovery.verify import verify_programs
from rdp.discovery.weightless import on_meta, weightless
from rdp.discovery.writer import NotIndependent, branch_program


@dataclass(frozen=True)
class Discovery:
    """What one traced forward shows: branches without rates, in forward order, and what was refused."""

    branches: tuple[Branch, ...]
    refused: tuple[Refusal, ...]
    additions: int
    """Number of additions that were looked at."""
    coupled: str | None
    """The first branch whose rows come out different beside other rows, even in eval mode."""
    programs: Mapping[str, Program]
    """By name, the branches that can be run on some of the rows."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Why additions are no residual sums, and how many are none for that reason."""


def find_branches(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    named: Sequence[str] = (),
    need_rows: bool = True,
    want_programs: bool = False,
    allow_random: bool = False,
    allow_batch_norm: bool = False,
) -> Discovery:
    """Find every residual branch of `model` from forwards of two rows and of one row of the given inputs.

    Mode, gradients, BatchNorm statistics and random number generators are left as they were.

    Args:
        model: Any model; on `meta` too.
        args: Positional inputs of its forward; at most two rows of the batch are used.
        kwargs: Keyword inputs of its forward.
        named: Modules to gate although they were not found, or refused; the user vouches for them.
        need_rows: Refuse branches on whose output the rows of the batch cannot be located, as row mode must.
        want_programs: Find out which branches can be run on some of the rows.
        allow_random: Among them also those that draw random numbers in training.
        allow_batch_norm: Among them also those with batch normalisation.

    Returns:
        What was found.
    """
    with forwards.undisturbed(model):
        pair, single = forwards.take_rows((args, kwargs), 2), forwards.take_rows((args, kwargs), 1)
        for graph, alone in _traced(model, pair, single):
            residuals, rejected = find_residuals(graph)
            residuals, side_inputs = without_side_inputs(graph, residuals)
            candidates = find_candidates(graph, model, residuals, named)
            programs: dict[str, Program] = {}
            reasons: dict[str, str] = {}
            wrong: dict[str, str] = {}
            if want_programs:
                programs, reasons = _programs(graph, alone, model, candidates, allow_random, allow_batch_norm)
                wrong = verify_programs(model, pair, programs)
            if not wrong and any(candidate.reason is None for candidate in candidates):
                break
        reasons |= wrong
        gates = {id(c): _gate_points(graph, alone, c) for c in candidates}
        # Branches that were verified are known to be independent.
        dense = [g for c in candidates if c.name not in programs or c.name in reasons for g in gates[id(c)]]
        coupled = first_coupled(model, pair, single, dense) if need_rows else None
    for candidate in candidates:
        if need_rows and candidate.reason is None and any(gate.rows is None for gate in gates[id(candidate)]):
            candidate.reason = "its output has no axis that follows the batch; mode='batch' needs none"
    accepted = [c for c in candidates if c.reason is None]
    refused = [c for c in candidates if c.reason is not None and not any(a.encloses(c) for a in accepted)]
    branches = _branches(graph, accepted, [gates[id(c)] for c in accepted], reasons)
    return Discovery(
        branches,
        tuple(Refusal(c.name, _block(graph, c), c.reason or "") for c in refused),
        additions=len(residuals) + len(rejected) + len(side_inputs),
        coupled=coupled,
        programs={name: program for name, program in programs.items() if name not in reasons},
        rejected=Counter(rejection.reason for rejection in [*rejected, *side_inputs]),
    )


def _traced(model: nn.Module, pair: Inputs, single: Inputs) -> Iterator[tuple[Graph, Graph]]:
    """The forwards of two rows and of one row, on `meta` if that can be, and then with numbers.

    The second is for those who find the first wrong, or empty: a model may choose by the values of its inputs what it
    does.
    """
    device = forwards.only_device(model)
    if device is not None and not torch.is_autocast_enabled(device.type):  # which does nothing on `meta`
        graphs = None
        # Whatever cannot be done without numbers is done with them.
        with suppress(Exception), weightless(model):
            graphs = tuple(Graph(Trace(model).run(*on_meta(inputs))) for inputs in (pair, single))
        if graphs is not None:
            yield graphs[0], graphs[1]
    yield Graph(Trace(model).run(*pair)), Graph(Trace(model).run(*single))


def _programs(
    graph: Graph,
    single: Graph,
    model: nn.Module,
    candidates: list[Candidate],
    allow_random: bool,
    allow_batch_norm: bool,
) -> tuple[dict[str, Program], dict[str, str]]:
    """The branches written as programs, and why the others cannot be."""
    programs: dict[str, Program] = {}
    reasons: dict[str, str] = {}
    for candidate in candidates:
        if candidate.reason is not None:
            continue
        try:
            if len(candidate.residuals) != 1 or len(candidate.seams) != 1 or candidate.seams[0].of_block:
                raise NotIndependent("it does not end in one module")
            residual, seam = candidate.residuals[0], candidate.seams[0]
            program = branch_program(graph, single, model, residual, seam, allow_batch_norm)
            if not allow_random and draws_random_numbers(model, program):
                raise NotIndependent("it has dropout inside, see compute='rows'")
            programs[candidate.name] = program
        except NotIndependent as why:
            reasons[candidate.name] = str(why)
    return programs, reasons


def _gate_points(graph: Graph, single: Graph, candidate: Candidate) -> tuple[GatePoint, ...]:
    twins = {(call.name, call.ordinal): call for call in single.trace.calls}
    points: dict[tuple[str, int], GatePoint] = {}
    for seam in candidate.seams:
        name, leaf = seam.call.name, seam.call.outputs.index(seam.value)
        twin = twins.get((name, seam.call.ordinal))
        rows = None
        if twin is not None and leaf < len(twin.outputs):
            rows = row_axis(graph.values[seam.value].shape, single.values[twin.outputs[leaf]].shape)
        points[name, leaf] = GatePoint(name, leaf, rows, seam.zero_only, seam.of_block)
    return tuple(points.values())


def _owner(graph: Graph, candidate: Candidate) -> Call | None:
    if candidate.residuals:
        return graph.values[candidate.residuals[0].sum].owner
    return candidate.seams[0].call.parent


def _block(graph: Graph, candidate: Candidate) -> str:
    owner = _owner(graph, candidate)
    return owner.name if owner is not None else ""


def _branches(
    graph: Graph,
    accepted: list[Candidate],
    points: list[tuple[GatePoint, ...]],
    dense: Mapping[str, str],
) -> tuple[Branch, ...]:
    parameters = parameters_by_branch(graph, [_ends(candidate) for candidate in accepted])
    groups = [_rate_group(graph, candidate) for candidate in accepted]
    depths = {group: depth for depth, group in enumerate(dict.fromkeys(groups))}
    branches = []
    for candidate, gates, names, group in zip(accepted, points, parameters, groups, strict=True):
        sums = max(len(candidate.residuals), 1)
        notes = [f"{sums} sums share one module, and so one mask"] if sums > 1 else []
        notes += ["ambiguous"] if any(r.ambiguous for r in candidate.residuals) else []
        notes += [f"dense: {dense[candidate.name]}"] if candidate.name in dense else []
        around = _innermost([i for i, c in enumerate(accepted) if c.encloses(candidate)], accepted)
        branches.append(
            Branch(
                name=candidate.name,
                block=_block(graph, candidate),
                kind=candidate.kind,
                parameters=tuple(names),
                sums=sums,
                depth=depths[group],
                gates=gates,
                inside=around[0] if around else None,
                note=", ".join(notes),
            )
        )
    return tuple(branches)


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
