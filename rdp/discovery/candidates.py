"""From residual sums to candidates for branches: grouped where modules are shared, refused where gating is unsound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from rdp.branches import Kind
from rdp.discovery.cuts import Cut, NoCut, find_cuts
from rdp.discovery.graph import Graph
from rdp.discovery.nesting import End, Nesting
from rdp.discovery.residuals import Residual
from rdp.discovery.seams import Seam, block_seam, find_seams, parameters_after

_INNER_SHARE = 0.5
"""Of nested branches the outer one is gated if the inner ones hold less than this share of its parameters."""


@dataclass
class Candidate:
    """A branch in the making: the sums it feeds and the module outputs that would be masked."""

    residuals: list[Residual]
    seams: list[Seam]
    path: set[int]
    """Every value between a fork and the end of the branch."""
    reason: str | None = None
    """Why it cannot be gated soundly."""
    kind: Kind = "named"
    cuts: list[Cut] = field(default_factory=list)
    """Where else FREEZE stops gradients."""
    note: str = ""
    """What a reader of the table should know."""
    vouched: bool = False
    """Gated on the word of the user, who knows better than that reason."""

    @property
    def name(self) -> str:
        """The last of the modules that are masked; "" if there is none."""
        return self.seams[-1].call.name if self.seams else ""

    def ends(self, graph: Graph) -> list[End]:
        """Where it is gated."""
        if self.residuals and (not self.vouched or any(seam.of_block for seam in self.seams)):
            return [(r.entry, i) for r in self.residuals for i in (r.branch, *r.factors)]
        return [(None, seam.value) for seam in self.seams]  # what is masked, whatever becomes of it


def held(candidates: Sequence[Candidate]) -> list[list[int]]:
    """For each of some candidates the places of those others that are masked on the way from x to its end."""
    masked: dict[int, list[int]] = defaultdict(list)
    for place, candidate in enumerate(candidates):
        for seam in candidate.seams:
            masked[seam.value].append(place)
    return [
        sorted({other for value in c.path if value in masked for other in masked[value]} - {place})
        for place, c in enumerate(candidates)
    ]


def find_candidates(
    graph: Graph, model: nn.Module, residuals: list[Residual], named: Sequence[str], stops: bool
) -> list[Candidate]:
    """The candidates of all residual sums, in forward order, and the modules that the user has named.

    Args:
        graph: The traced forward.
        model: The traced model.
        residuals: Its residual sums.
        named: Modules to gate although they were not found, or refused.
        stops: Must gradients be stopped, as FREEZE does?
    """
    candidates = _candidates(graph, residuals)
    for candidate in candidates if stops else ():
        if candidate.reason is None:
            try:
                candidate.cuts = find_cuts(graph, candidate.residuals, candidate.seams, candidate.path)
            except NoCut as why:
                # All of a block can be detached, whatever the branch is multiplied by.
                whole = block_seam(graph, candidate.residuals[0]) if len(candidate.residuals) == 1 else []
                if whole and graph.trace.count[whole[0].call.name] == 1:
                    candidate.seams = whole
                else:
                    candidate.reason = str(why)
    return _with_named(graph, _without_nested(graph, model, candidates), named)


def _candidates(graph: Graph, residuals: list[Residual]) -> list[Candidate]:
    """One candidate a branch; sums fed by calls of the same modules are one branch with shared weights."""
    ways_out = _WaysOut(graph, residuals)
    groups: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for residual, seams in ways_out.ends:
        path = graph.between(residual.fork, residual.branch)
        reason = ways_out.unsound(residual, seams)
        notes = ways_out.notes(residual, seams) if reason is None else ""
        candidate = Candidate([residual], seams, path, reason, residual.kind, note=notes)
        key = tuple(seam.call.name for seam in seams) or (f"{residual.sum}", f"{residual.branch}")
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
            Candidate(
                [residual for c in group for residual in c.residuals],
                seams,
                set().union(*(c.path for c in group)),
                reasons[0] if reasons else None,
                group[0].kind,
                note=next(filter(None, (c.note for c in group)), ""),
            )
        )
    return merged


class _WaysOut:
    """Where the values of branches go besides the sum that they are for."""

    def __init__(self, graph: Graph, residuals: list[Residual]) -> None:
        self.graph = graph
        self.ends = [(residual, find_seams(graph, residual)) for residual in residuals]
        self._sums: dict[int, set[int]] = defaultdict(set)
        """Of each value at the end of a branch, where the sums begin that take it."""
        for residual, seams in self.ends:
            for seam in seams:
                self._sums[seam.value].add(residual.entry)
        self._refused: set[int] = set()
        """Sums whose gates do not exist, so that what they take in is not dropped."""
        while True:
            refused = {r.sum for r, seams in self.ends if self.unsound(r, seams) is not None}
            if refused <= self._refused:
                break
            self._refused |= refused

    def unsound(self, residual: Residual, seams: list[Seam]) -> str | None:
        """Why a branch cannot be gated there."""
        graph = self.graph
        if not seams:
            return (
                f"no module returns what is added; the branch ends in the function `{graph.values[residual.branch].op}`"
            )
        if any(seam.of_block for seam in seams):
            return None
        late = parameters_after(graph, residual, residual.branch, seams)
        if late:
            before = ", ".join(f"`{seam.call.name}`" for seam in seams)
            return f"{sorted(late)} are applied after {before}, outside of any module; FREEZE could not keep them still"
        for seam in seams:
            # One module may end the branches of several sums, which are then gated together.
            if graph.reaches_output([seam.value], around=self._sums[seam.value]):
                return f"the output of `{seam.call.name}` also feeds something other than the residual sum"
            inner, around = self._inner(residual, seam), self._gated(residual)
            if graph.reaches_output(inner, around) and graph.joins(inner, around, residual.sum):
                return (
                    f"values inside the branch, before `{seam.call.name}`, also reach the model's output by another way"
                )
        return None

    def notes(self, residual: Residual, seams: list[Seam]) -> str:
        """What else is made of a branch, and stays."""
        around = self._gated(residual)
        if any(not s.of_block and self.graph.reaches_output(self._inner(residual, s), around) for s in seams):
            return "values inside of it are also used beside the residual stream, where nothing drops them"
        return ""

    def _inner(self, residual: Residual, seam: Seam) -> set[int]:
        """What is made of x before the end of the branch; views of x are x itself."""
        path = self.graph.between(residual.fork, seam.value)
        return path - self.graph.views(residual.fork, path) - {seam.value}

    def _gated(self, residual: Residual) -> set[int]:
        """Where the ways end on which something is dropped: other branches may be made of the same values."""
        return {residual.entry} | {r.branch for r, _ in self.ends if r is not residual and r.sum not in self._refused}


def _without_nested(graph: Graph, model: nn.Module, candidates: list[Candidate]) -> list[Candidate]:
    """Of branches inside branches keep the outer one, unless the inner ones hold most of its parameters."""
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}

    def numel(candidate: Candidate) -> int:
        return sum(sizes.get(name, 0) for name in graph.parameters(candidate.path))

    sound = [c for c in candidates if c.reason is None]
    nesting = Nesting(graph, [c.ends(graph) for c in sound])
    inside = held(sound)
    dropped: set[int] = set()
    for place, outer in reversed([*enumerate(sound)]):  # an outer sum comes after the inner ones
        # What lies inside but on no way from x, such as queries that are made elsewhere, is another branch's business.
        inner = [sound[i] for i in inside[place] if nesting.encloses(place, i) and id(sound[i]) not in dropped]
        if id(outer) in dropped or not inner:
            continue
        if sum(numel(c) for c in inner) < _INNER_SHARE * numel(outer):
            dropped |= {id(c) for c in inner}
        else:
            dropped.add(id(outer))
    return [c for c in candidates if id(c) not in dropped]


def _with_named(graph: Graph, candidates: list[Candidate], named: Sequence[str]) -> list[Candidate]:
    """Accept what the user named: a refused candidate, or else the module's output whatever becomes of it."""
    for name in named:
        known = next((c for c in candidates if c.name == name), None)
        if known is not None:
            known.reason, known.vouched = None, known.reason is not None
            continue
        calls = [call for call in graph.trace.calls if call.name == name and call.outputs]
        if calls:
            path = {v.index for v in graph.values if v.is_data and any(c in calls for c in graph.owners(v.index))}
            candidates.append(Candidate([], [Seam(call, call.outputs[0]) for call in calls], path))
    return sorted(candidates, key=lambda c: c.seams[0].call.begin if c.seams else c.residuals[0].sum)
