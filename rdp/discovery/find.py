"""Finding the branches of a model: its residual sums, where their branches end, and which parameters they own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rdp.branches import Branch, GatePoint, Kind, Refusal
from rdp.discovery import forwards
from rdp.discovery.graph import Graph
from rdp.discovery.ownership import parameters_by_branch
from rdp.discovery.program import NotIndependent, Program, branch_program, draws_random_numbers
from rdp.discovery.residuals import Residual, find_residuals, without_side_inputs
from rdp.discovery.row_axes import first_coupled, row_axis
from rdp.discovery.seams import Seam, find_seams, parameters_after
from rdp.discovery.trace import Call, Trace
from rdp.discovery.verify import verify_programs

_INNER_SHARE = 0.5
"""Of nested branches the outer one is gated if the inner ones hold less than this share of its parameters."""


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


@dataclass
class _Candidate:
    """A branch in the making: the sums it feeds and the module outputs that would be masked."""

    residuals: list[Residual]
    seams: list[Seam]
    path: set[int]
    """Every value between a fork and the end of the branch."""
    reason: str | None = None
    """Why it cannot be gated soundly."""
    kind: Kind = "named"

    @property
    def name(self) -> str:
        return self.seams[-1].call.name if self.seams else ""

    def encloses(self, other: _Candidate) -> bool:
        return other is not self and any(residual.sum in self.path for residual in other.residuals)


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
        graph = Graph(Trace(model).run(*pair))
        residuals, rejected = find_residuals(graph)
        residuals, side_inputs = without_side_inputs(graph, residuals)
        candidates = _candidates(graph, residuals)
        candidates = _without_nested(graph, model, candidates)
        candidates = _with_named(graph, candidates, named)
        alone = Graph(Trace(model).run(*single))
        gates = {id(c): _gate_points(graph, alone, c) for c in candidates}
        programs: dict[str, Program] = {}
        reasons: dict[str, str] = {}
        if want_programs:
            programs, reasons = _programs(graph, alone, model, candidates, allow_random, allow_batch_norm)
            reasons |= verify_programs(model, pair, programs)
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
    )


def _candidates(graph: Graph, residuals: list[Residual]) -> list[_Candidate]:
    """One candidate a branch; sums fed by calls of the same modules are one branch with shared weights."""
    groups: dict[tuple[str, ...], list[_Candidate]] = defaultdict(list)
    for residual in residuals:
        seams = find_seams(graph, residual)
        path = graph.between(residual.fork, residual.branch)
        # Parallel branches may share their first modules; what runs through them ends in another branch.
        ends = {residual.sum} | {r.branch for r in residuals if r.fork == residual.fork and r is not residual}
        candidate = _Candidate([residual], seams, path, _unsound(graph, residual, seams, ends), residual.kind)
        key = tuple(seam.call.name for seam in seams) or (f"{residual.sum}",)
        groups[key].append(candidate)
    merged = []
    for group in groups.values():
        seams = [seam for c in group for seam in c.seams]
        reasons = [c.reason for c in group if c.reason is not None]
        calls = {(seam.call.name, seam.call.ordinal) for seam in seams}
        for name in sorted({seam.call.name for seam in seams}):
            gated, made = sum(n == name for n, _ in calls), graph.trace.count[name]
            if gated < made:
                reasons.append(f"`{name}` is called {made} times in a forward, {gated} of them at the end of a branch")
        merged.append(
            _Candidate(
                [residual for c in group for residual in c.residuals],
                seams,
                set().union(*(c.path for c in group)),
                reasons[0] if reasons else None,
                group[0].kind,
            )
        )
    return merged


def _unsound(graph: Graph, residual: Residual, seams: list[Seam], ends: set[int]) -> str | None:
    if not seams:
        return f"no module returns what is added; the branch ends in the function `{graph.values[residual.branch].op}`"
    if any(seam.of_block for seam in seams):
        return None
    late = parameters_after(graph, residual, residual.branch, seams)
    if late:
        before = ", ".join(f"`{seam.call.name}`" for seam in seams)
        return f"{sorted(late)} are applied after {before}, outside of any module; FREEZE could not keep them still"
    for seam in seams:
        if graph.reaches_output([seam.value], around=ends):
            return f"the output of `{seam.call.name}` also feeds something other than the residual sum"
        if graph.reaches_output(graph.between(residual.fork, seam.value), around=ends):
            return f"values inside the branch, before `{seam.call.name}`, also reach the model's output by another way"
    return None


def _without_nested(graph: Graph, model: nn.Module, candidates: list[_Candidate]) -> list[_Candidate]:
    """Of branches inside branches keep the outer one, unless the inner ones hold most of its parameters."""
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}

    def numel(candidate: _Candidate) -> int:
        return sum(sizes.get(name, 0) for name in graph.parameters(candidate.path))

    dropped: set[int] = set()
    for outer in reversed(candidates):  # an outer sum comes after the inner ones
        inner = [c for c in candidates if outer.encloses(c) and id(c) not in dropped and c.reason is None]
        if outer.reason is not None or id(outer) in dropped or not inner:
            continue
        if sum(numel(c) for c in inner) < _INNER_SHARE * numel(outer):
            dropped |= {id(c) for c in inner}
        else:
            dropped.add(id(outer))
    return [c for c in candidates if id(c) not in dropped]


def _with_named(graph: Graph, candidates: list[_Candidate], named: Sequence[str]) -> list[_Candidate]:
    """Accept what the user named: a refused candidate, or else the module's output whatever becomes of it."""
    for name in named:
        known = next((c for c in candidates if c.name == name), None)
        if known is not None:
            known.reason = None
            continue
        calls = [call for call in graph.trace.calls if call.name == name and call.outputs]
        if calls:
            path = {v.index for v in graph.values if v.is_data and any(c in calls for c in graph.owners(v.index))}
            candidates.append(_Candidate([], [Seam(call, call.outputs[0]) for call in calls], path))
    return sorted(candidates, key=lambda c: c.seams[0].call.begin if c.seams else c.residuals[0].sum)


def _programs(
    graph: Graph,
    single: Graph,
    model: nn.Module,
    candidates: list[_Candidate],
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


def _gate_points(graph: Graph, single: Graph, candidate: _Candidate) -> tuple[GatePoint, ...]:
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


def _owner(graph: Graph, candidate: _Candidate) -> Call | None:
    if candidate.residuals:
        return graph.values[candidate.residuals[0].sum].owner
    return candidate.seams[0].call.parent


def _block(graph: Graph, candidate: _Candidate) -> str:
    owner = _owner(graph, candidate)
    return owner.name if owner is not None else ""


def _branches(
    graph: Graph,
    accepted: list[_Candidate],
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


def _ends(candidate: _Candidate) -> list[tuple[int | None, int]]:
    """The sums that take in the branch, each with the value that it takes in; None where the sum is not known."""
    return [(r.sum, r.branch) for r in candidate.residuals] or [(None, seam.value) for seam in candidate.seams]


def _innermost(inside: list[int], accepted: list[_Candidate]) -> list[int]:
    """Of the candidates `inside` which something lies, those that enclose none of the others."""
    return [i for i in inside if not any(accepted[i].encloses(accepted[j]) for j in inside)]


def _rate_group(graph: Graph, candidate: _Candidate) -> str:
    """What shares a drop rate: the adding module or, where it loops over a list of modules, the item of that list."""
    owner = _owner(graph, candidate)
    prefix = f"{owner.name}." if owner is not None and owner.name else ""
    parts = candidate.name.removeprefix(prefix).split(".") if candidate.name.startswith(prefix) else []
    for position in range(1, len(parts)):
        container = prefix + ".".join(parts[:position])
        if graph.trace.count[container] == 0 and parts[position].isdigit():  # a list is never called itself
            return f"{container}.{parts[position]}"
    return f"{owner.name}#{owner.ordinal}" if owner is not None else ""
