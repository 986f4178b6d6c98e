"""Which value and which call of a forward of one row are those of the same forward of two.

The forwards are compared module by module, since they may differ here and there: `contiguous` makes nothing of one row,
a loss takes other ways, an expert is called for some tokens alone. Only where a branch lies does that matter.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from typing import Any

from rdp import trees
from rdp.branches import RowAxis
from rdp.discovery import ops
from rdp.discovery.graph import Graph
from rdp.discovery.records import Arguments, Call, Ref, Value
from rdp.rows.axes import row_axis

_Owner = tuple[str, int] | None

_WINDOW = 16
"""How many values further on in a call the twin of one is looked for."""


class Twins:
    """Values and calls of `pair`, a forward of two rows, and what they are in `single`, the same of one row."""

    def __init__(self, pair: Graph, single: Graph) -> None:
        self._pair, self._single = pair, single
        self._calls = {(call.name, call.ordinal): call for call in single.trace.calls}
        self._values: dict[int, int] = {}
        self._passed: set[int] = set()  # of two rows, the copies that are none of one row
        self._copied: dict[int, int] = {}  # of one row, what is a copy, and of what
        made: dict[_Owner, deque[Value]] = defaultdict(deque)
        for value in single.values:
            made[_owner(value)].append(value)
        for value in pair.values:
            self._match(value, made[_owner(value)])

    def call(self, call: Call) -> Call | None:
        """The call in the forward of one row."""
        return self._calls.get((call.name, call.ordinal))

    def value(self, index: int) -> int | None:
        """The value in the forward of one row."""
        if index in self._values:
            return self._original(self._values[index])
        # What a module computes differently is still what it returns.
        for call in self._pair.values[index].returned_by:
            twin, leaf = self.call(call), call.outputs.index(index)
            if twin is not None and leaf < len(twin.outputs):
                return self._original(twin.outputs[leaf])
        return None

    def are(self, pair: int, single: int) -> bool:
        """Are these the same value?"""
        return self.value(pair) == self._original(single)

    def arguments(self, index: int) -> Arguments | None:
        """What the value was made with, in the forward of one row."""
        if index not in self._passed:
            recipe = self._single.values[self._values[index]].recipe if index in self._values else None
            return None if recipe is None else recipe.arguments
        recipe = self._pair.values[index].recipe
        arguments: Arguments | None = None if recipe is None else trees.map_leaves(self._twin_of, recipe.arguments)
        return arguments

    def shape(self, index: int) -> tuple[int, ...] | None:
        """The shape that the value has in the forward of one row."""
        twin = self.value(index)
        return None if twin is None else self._single.values[twin].shape

    def alike(self, index: int) -> bool:
        """Has the value the same shape in both?"""
        return self._pair.values[index].shape == self.shape(index)

    def row_axis(self, index: int) -> RowAxis | None:
        """The axis on which the value has its rows; None if that is unclear, or it has none."""
        single = self.shape(index)
        return None if single is None else row_axis(self._pair.values[index].shape, single)

    def _match(self, value: Value, waiting: deque[Value]) -> None:
        """Find the twin of a value, among those of the same call that have not got one."""
        copies = 0
        for number, other in enumerate(itertools.islice(waiting, _WINDOW)):
            if self._alike(value, other):
                self._values[value.index] = other.index
                for _ in range(number + 1):
                    waiting.popleft()
                return
            if number == copies and _copies(other, self._single):
                self._copied[other.index] = self._original(other.inputs[0])
                copies += 1
        if _copies(value, self._pair) and (twin := self.value(value.inputs[0])) is not None:
            self._values[value.index] = twin
            self._passed.add(value.index)

    def _alike(self, two: Value, one: Value) -> bool:
        made_of_the_same = [self.value(i) for i in two.inputs] == [self._original(i) for i in one.inputs]
        return (two.op, two.parameter) == (one.op, one.parameter) and made_of_the_same

    def _twin_of(self, leaf: Any) -> Any:
        twin = self.value(leaf.value) if isinstance(leaf, Ref) else None
        return leaf if twin is None else Ref(twin)

    def _original(self, single: int) -> int:
        return self._copied.get(single, single)


def _owner(value: Value) -> _Owner:
    return None if value.owner is None else (value.owner.name, value.owner.ordinal)


def _copies(value: Value, graph: Graph) -> bool:
    """Is it its input again, or that for every row? Where there is nothing to do, the input itself may be returned."""
    if value.op not in ops.VIEW | ops.BROADCAST or not value.inputs:
        return False
    shape = graph.values[value.inputs[0]].shape
    return shape == value.shape or (value.op in ops.BROADCAST and row_axis(value.shape, shape) is not None)
