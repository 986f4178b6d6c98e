"""Which branches lie inside others: those that reach the model's output through the gates of others alone.

Every way from a value to the output is followed to the first gate on it. A gate sits where a sum takes in a branch or,
where that sum is not known, on the value that a module returned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rdp.discovery.graph import Graph

End = tuple[int | None, int]
"""Where a branch is gated: a sum and the operand that it takes in, or (None, value) wherever the value goes."""

_OUTPUT: End = (None, -1)
"""Stands for the output, reached without a gate."""


class Nesting:
    """The nesting of branches in one forward.

    Args:
        graph: The forward.
        ends: Of each branch; several where modules share their weights.

    Attributes:
        around: For each branch the nearest ones that it lies inside of; none if it reaches the output also by itself.
            They are several where branches run side by side: it learns through any of them.
    """

    def __init__(self, graph: Graph, ends: Sequence[Sequence[End]]) -> None:
        self._place = {end: place for place, own in enumerate(ends) for end in own}
        self._last = [max(value if user is None else user for user, value in own) for own in ends]
        self._ahead: list[frozenset[End]] = [frozenset()] * len(graph.values)
        """The first gates on the ways from a value to the output; none if it does not get there."""
        self._behind: dict[End, frozenset[End]] = {}
        """The same from where a gate lets through."""
        outputs = set(graph.outputs)
        for node in reversed(graph.values):  # users come after what they use
            if node.is_data:
                ahead = frozenset([_OUTPUT] if node.index in outputs else [])
                ahead |= self._passed([(user, node.index) for user in node.users if self._ahead[user]])
                self._ahead[node.index] = self._gated((None, node.index), self._nearest(ahead))
        self.around = [self._around(place, own) for place, own in enumerate(ends)]

    def encloses(self, outer: int, inner: int) -> bool:
        """Does branch `inner` reach the output through branch `outer` alone?"""
        return bool(self.around[inner]) and all(a == outer or self.encloses(outer, a) for a in self.around[inner])

    def is_inside(self, value: int) -> bool:
        """Does a value reach the output through gates alone?"""
        return bool(self._ahead[value]) and _OUTPUT not in self._ahead[value]

    def _passed(self, edges: Collection[tuple[int, int]]) -> frozenset[End]:
        """What is met on the ways that begin with these edges, each a user and what it uses."""
        return frozenset[End]().union(*(self._gated(edge, self._ahead[edge[0]]) for edge in edges))

    def _gated(self, end: End, ahead: frozenset[End]) -> frozenset[End]:
        """What is met first: `end`, if that is a gate that leads somewhere, or else what lies ahead of it."""
        if end not in self._place or not ahead:
            return ahead
        self._behind[end] = ahead
        return frozenset({end})

    def _nearest(self, gates: frozenset[End]) -> frozenset[End]:
        """Without those that lead through others of them anyway."""
        if _OUTPUT in gates:
            return frozenset({_OUTPUT})
        return frozenset(gate for gate in gates if not self._leads_through(gate, gates)) if len(gates) > 1 else gates

    def _leads_through(self, gate: End, others: frozenset[End]) -> bool:
        return all(
            after in others or (after != _OUTPUT and self._leads_through(after, others)) for after in self._behind[gate]
        )

    def _around(self, place: int, ends: Sequence[End]) -> tuple[int, ...]:
        gates = frozenset[End]().union(*(self._behind.get(end, ()) for end in ends))
        if _OUTPUT in gates:
            return ()
        # Calls of two shared branches may lie inside each other; the one that ends last is the outer one.
        return tuple(sorted(p for p in {self._place[gate] for gate in gates} if self._last[p] > self._last[place]))
