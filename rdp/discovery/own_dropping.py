"""Stochastic depth that a model brings along, recognised by what it does: branches that it leaves out by chance.

LayerDrop does not call a layer, stochastic depth multiplies a branch by one random number a row. In two forwards as in
training, one with all draws low and one with all high, such a branch is there in one and not in the other.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from torch import nn

from rdp.discovery import ops
from rdp.discovery.chance import ChanceTrace, chance_trace, draws_numbers
from rdp.discovery.forwards import Inputs
from rdp.discovery.graph import Graph
from rdp.discovery.residuals import find_residuals
from rdp.native import NativeDrop, settings_around

_TRIALS = 60
BranchKey = tuple[str, str]
"""The module that adds, and the one whose output ends the branch."""


@dataclass(frozen=True)
class OwnDropping:
    """Branches that a model leaves out by chance.

    Attributes:
        branches: Names of the modules that end them.
        settings: What they are not left out any more without; empty where no such setting was found.
        suspects: Where there is none, settings whose names speak of it.
    """

    branches: tuple[str, ...]
    settings: tuple[NativeDrop, ...]
    suspects: tuple[NativeDrop, ...] = ()


def own_dropping(model: nn.Module, inputs: Inputs) -> list[OwnDropping]:
    """The branches that `model` leaves out by chance, by the settings that cause it.

    Runs within `forwards.undisturbed`, on `meta` where that can be, and leaves the model and all generators as they
    were. Of a model of which no forward in training comes to its end nothing is known, and nothing found.
    """
    if not draws_numbers(model, inputs) or (seen := _look(model, inputs)) is None:
        return []
    left = seen.by_chance()
    if not left:
        return []
    groups = settings_around(model, [*(end for _, end in left), *seen.drawing])
    found = []
    with ExitStack() as silent:
        for group in groups[:_TRIALS]:
            with suppress(Exception), ExitStack() as trial:
                for setting in group:
                    trial.callback(setting.restore)
                    setting.silence()
                after = _look(model, inputs)
                if after is not None and (kept := left & after.low & after.high):
                    found.append(OwnDropping(_ends(kept), tuple(group)))
                    left -= kept
                    silent.enter_context(trial.pop_all())  # while the others are tried
            if not left:
                return found
    suspects = tuple(setting for group in groups for setting in group if setting.speaks and setting.off == 0)
    return [*found, OwnDropping(_ends(left), (), suspects)]


@dataclass(frozen=True)
class _Seen:
    """Which branches take part in a forward with low draws, and in one with high draws; which modules draw."""

    low: set[BranchKey]
    high: set[BranchKey]
    drawing: set[str]

    def by_chance(self) -> set[BranchKey]:
        """Branches of one forward alone, but where another takes their place: that is a choice, of experts perhaps."""
        low, high = (Counter(map(_pattern, keys)) for keys in (self.low, self.high))
        return {key for key in self.low ^ self.high if low[_pattern(key)] != high[_pattern(key)]}


def _pattern(key: BranchKey) -> str:
    return re.sub(r"\d+", "*", ":".join(key))


def _ends(keys: set[BranchKey]) -> tuple[str, ...]:
    return tuple(sorted({end for _, end in keys}))


def _look(model: nn.Module, inputs: Inputs) -> _Seen | None:
    low, high = chance_trace(model, inputs, high=False), chance_trace(model, inputs, high=True)
    if low is None or high is None:
        return None
    draws = [v for v in low.values + high.values if v.op in ops.DRAWS | ops.DROPOUT and not v.is_data]
    return _Seen(_taking_part(low), _taking_part(high), {v.owner.name for v in draws if v.owner is not None})


def _taking_part(trace: ChanceTrace) -> set[BranchKey]:
    graph = Graph(trace)
    residuals, _ = find_residuals(graph)
    sums = {residual.sum for residual in residuals}
    ends = [(residual.sum, residual.branch) for residual in residuals]
    for node in graph.values:  # y = where(keep, layer(x), x)
        data = [i for i in node.inputs if graph.values[i].is_data]
        if node.op == "where" and len(data) == 2 and any(i in trace.zero for i in node.inputs):
            first, last = sorted(data)
            if sums & graph.between(first, last):
                ends.append((node.index, node.index))
    taking_part = set()
    for at, branch in ends:
        end, multiplied_by_zero = _end(graph, trace, branch)
        if not multiplied_by_zero:
            owner = graph.values[at].owner
            taking_part.add((owner.name if owner is not None else "", end))
    return taking_part


def _end(graph: Graph, trace: ChanceTrace, branch: int) -> tuple[str, bool]:
    """The module that ends a branch, and whether it teaches nothing: taken away by a number of no data, one a row."""
    owner, name, zero = graph.values[branch].owner, None, False
    while True:
        node = graph.values[branch]
        zero |= node.op in ops.PRODUCT and any(trace.zero.get(i, False) for i in node.inputs)
        zero |= not node.has_gradients  # an estimate, say, that a diffusion model is given in half of the steps
        if name is None and node.returned_by:
            name = node.returned_by[-1].name
        data = [i for i in node.inputs if graph.values[i].is_data]
        if len(data) != 1 or node.op not in ops.COMMUTES | ops.PRODUCT:
            return name if name is not None else owner.name if owner is not None else "", zero
        branch = data[0]
