"""Questions about a traced forward: ancestors, ways from one value to another, what is used on them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator

from rdp.discovery import ops
from rdp.discovery.records import Call, Value
from rdp.discovery.trace import Trace

LINEAR_FORM, AFFINE_MAP, NONLINEAR = range(3)
"""How far a path is from the identity: views and scaling, then affine layers, then anything else."""

_SUM_DEPTH = 6


class Graph:
    """Read-only queries on a `Trace`; values are named by their index."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.values: list[Value] = trace.values
        self.trainable = {name for name, _ in trace.model.named_parameters(remove_duplicate=False)}

    @property
    def outputs(self) -> tuple[int, ...]:
        """The values that the model returns; where it hides them, the last that was made."""
        return self.trace.root.outputs or tuple(range(len(self.values)))[-1:]

    def ancestors(self, value: int, since: int, without: Collection[str] = ()) -> set[int]:
        """The data-dependent values made at or after `since` that `value` was made from, and itself.

        Args:
            value: Where to start.
            since: Values made before this one are left out.
            without: Ways through these functions are not followed.
        """
        seen: set[int] = set()
        todo = [value]
        while todo:
            index = todo.pop()
            node = self.values[index]
            if index not in seen and index >= since and node.is_data and node.op not in without:
                seen.add(index)
                todo.extend(node.inputs)
        return seen

    def between(self, fork: int, end: int) -> set[int]:
        """Every value on a way from `fork` to `end`, without `fork` and with `end`."""
        above = self.ancestors(end, fork)
        below = {fork}
        for index in sorted(above):
            if any(i in below for i in self.values[index].inputs):
                below.add(index)
        return (below & above) - {fork}

    def strip(self, value: int) -> int:
        """The value that `value` is a view of."""
        node = self.values[value]
        while self._is_view(node) and self.values[node.inputs[0]].is_data:
            node = self.values[node.inputs[0]]
        return node.index

    def _is_view(self, node: Value) -> bool:
        if node.op == "__getitem__" and len(node.inputs) == 1:  # `x[None]`
            return math.prod(node.shape) == math.prod(self.values[node.inputs[0]].shape)
        return node.op in ops.VIEW and bool(node.inputs)

    def views(self, value: int, within: Collection[int]) -> set[int]:
        """`value`, and those `within` that hold its numbers, or some of them, and nothing else."""
        found = {value}
        for index in sorted(within):
            node = self.values[index]
            if node.op in ops.VIEW | ops.SLICE and node.inputs[0] in found:
                found.add(index)
        return found

    def sources(self, value: int) -> Iterator[int]:
        """`value`, and those whose numbers it holds, some of them or several times."""
        yield value
        node = self.values[value]
        while node.op in ops.VIEW | ops.SLICE | ops.BROADCAST and self.values[node.inputs[0]].is_data:
            node = self.values[node.inputs[0]]
            yield node.index

    def terms(self, value: int, depth: int = 0) -> Iterator[int]:
        """`value` and, if it is a sum, its terms and partial sums."""
        yield value
        node = self.values[self.strip(value)]
        if node.op in ops.ADD | ops.SUBTRACT and depth < _SUM_DEPTH:
            for i in node.inputs:
                yield from self.terms(i, depth + 1)

    def constants(self, path: Iterable[int]) -> set[int]:
        """The values used on `path` that do not depend on data: parameters, buffers and what is computed from them."""
        seen: set[int] = set()
        todo = [i for index in path for i in self.values[index].inputs if not self.values[i].is_data]
        while todo:
            index = todo.pop()
            if index not in seen:
                seen.add(index)
                todo.extend(self.values[index].inputs)
        return seen

    def parameters(self, path: Iterable[int]) -> set[str]:
        """Names of the parameters and buffers used on `path`."""
        return {name for i in self.constants(path) if (name := self.values[i].parameter) is not None}

    def unused(self) -> frozenset[str]:
        """Names of the parameters that the forward did not use, the first of several names each."""
        used = {value.parameter for value in self.values}
        return frozenset(name for name, _ in self.trace.model.named_parameters() if name not in used)

    def rank(self, path: Collection[int]) -> int:
        """`LINEAR_FORM`, `AFFINE_MAP` or `NONLINEAR`."""
        nodes = [self.values[i] for i in path]
        if any(node.op in ops.SCALE and sum(self.values[i].is_data for i in node.inputs) > 1 for node in nodes):
            return NONLINEAR  # one data-dependent value gates another
        used = {node.op for node in nodes}
        if used <= ops.VIEW | ops.SLICE | ops.SCALE | {"pad"}:
            return LINEAR_FORM
        return AFFINE_MAP if used <= ops.AFFINE else NONLINEAR

    def reaches_output(self, sources: Iterable[int], around: Collection[int]) -> bool:
        """Does one of `sources` reach the model's output on a way that passes none of the values `around`?"""
        outputs = set(self.trace.root.outputs)
        seen: set[int] = set()
        todo = list(sources)
        while todo:
            index = todo.pop()
            if index in seen or index in around:
                continue
            if index in outputs:
                return True
            seen.add(index)
            todo.extend(self.values[index].users)
        return False

    def joins(self, sources: Iterable[int], around: Collection[int], stream: int) -> bool:
        """The same, but do they get into an output that is made of `stream`, too, and not by a number alone?

        What does not join is an output of its own, or a term of the loss.
        """
        numbers = {node.index for node in self.values if node.shape == ()}
        reached = self._below(sources, numbers.union(around)).intersection(self.trace.root.outputs)
        return bool(reached) and not reached.isdisjoint(self._below([stream], ()))

    def _below(self, sources: Iterable[int], around: Collection[int]) -> set[int]:
        """All that is made of these on ways that pass none of the values `around`, and these."""
        seen: set[int] = set()
        todo = list(sources)
        while todo:
            index = todo.pop()
            if index not in seen and index not in around:
                seen.add(index)
                todo.extend(self.values[index].users)
        return seen

    def owners(self, value: int) -> set[Call]:
        """The module calls that were running when `value` was made."""
        owner = self.values[value].owner
        return set() if owner is None else set(owner.chain())
