"""Which parameters can learn through which branches only.

The forward is followed backwards from the output; a value belongs to the branch that was entered last. So what a branch
draws from elsewhere is its own too, such as the keys and values of a cross attention.
"""

from __future__ import annotations

from collections import defaultdict

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
    order = [name for name, _ in graph.trace.model.named_parameters(remove_duplicate=False)]
    return [[name for name in order if name in mine] for mine in used]
