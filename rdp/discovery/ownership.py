"""Which parameters can learn through which branches only.

The forward is followed backwards from the output; a value belongs to the branch that was entered last. So what a branch
draws from elsewhere is its own too, such as the keys and values of a cross attention. What the forward did not use,
such as experts that got none of its rows, belongs where the module does that would have used it.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from rdp.discovery.graph import Graph
from rdp.discovery.nesting import End

Place = int | None
"""The number of a branch, or None for what no gate guards."""


def parameters_by_branch(graph: Graph, ends: list[list[End]]) -> list[list[str]]:
    """For each branch the parameters that reach the output through it, and on no way without a gate.

    Args:
        graph: Of one forward.
        ends: Of each branch, where it is entered from behind.

    Returns:
        Names, in the order of `named_parameters`; one that several branches use is listed by each.
    """
    entered = {end: place for place, branch_ends in enumerate(ends) for end in branch_ends}
    seen: dict[Place, set[int]] = defaultdict(set)
    todo: list[tuple[int, Place]] = [(output, None) for output in graph.outputs]
    behind_gates: list[tuple[int, Place]] = []
    while todo or behind_gates:
        if not todo:
            todo = [behind_gates.pop()]  # only when all is known that no gate guards
        value, place = todo.pop()
        place = entered.get((None, value), place)
        if value in seen[place] or value in seen[None] or not graph.values[value].is_data:
            continue
        seen[place].add(value)
        for source in graph.values[value].inputs:
            gate = entered.get((value, source), place)
            (todo if gate is None else behind_gates).append((source, gate))
    ungated = graph.parameters(seen[None])
    used = [(graph.parameters(seen[place]) & graph.trainable) - ungated for place in range(len(ends))]
    for name, place in [*_unused(graph, seen, used)]:
        used[place].add(name)
    order = [name for name, _ in graph.trace.model.named_parameters(remove_duplicate=False)]
    return [[name for name in order if name in mine] for mine in used]


def _unused(graph: Graph, seen: Mapping[Place, set[int]], used: list[set[str]]) -> Iterator[tuple[str, int]]:
    """Parameters that the forward did not use, with each branch that they would have reached the output through.

    Where the module that holds them also makes something that no gate guards, they go with those of the same kind,
    whose names differ in numbers alone.
    """
    outputs: dict[str, set[int]] = defaultdict(set)
    for call in graph.trace.calls:
        outputs[call.name].update(value for value in call.outputs if graph.values[value].is_data)

    @functools.cache
    def places(holder: str) -> list[int]:
        return [place for place in range(len(used)) if not outputs[holder].isdisjoint(seen[place])]

    @functools.cache
    def kinds(place: int) -> set[str]:
        return {_kind(name) for name in used[place]}

    for name in graph.unused():
        holder = name
        while holder and holder not in outputs:
            holder = holder.rpartition(".")[0]
        mixed = not outputs[holder].isdisjoint(seen[None])
        yield from ((name, place) for place in places(holder) if not mixed or _kind(name) in kinds(place))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
