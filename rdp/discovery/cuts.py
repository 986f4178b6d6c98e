"""Where FREEZE stops gradients besides the end of a branch: on what the branch is multiplied by, if not made from x.

In `x + g(c) * f(x)` the branch is the whole product. Its gate sits on f, and would let g, and what c was made by,
learn from frozen rows. So a *cut* is looked for on the way back from the product to c: a value that a module returns
or takes, and that is used, from there on, for this branch only. Where a module makes several things at once (the six
parts of adaLN-Zero in one Linear), only those of its elements are cut that the product is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdp import trees
from rdp.discovery import ops
from rdp.discovery.graph import Graph
from rdp.discovery.records import Call, Ref, Value
from rdp.discovery.residuals import Residual
from rdp.discovery.seams import Seam

_EVER = 1 << 60


@dataclass(frozen=True, eq=False)
class Cut:
    """A value that sends no gradient back from the frozen rows of a branch."""

    call: Call
    value: int
    of_input: bool
    """Is it an argument of the call, or one of its outputs?"""
    elements: Tensor
    """Which of its elements are cut, bool and of its shape."""

    @property
    def leaf(self) -> int:
        """Its number among the tensors that the call takes or returns."""
        return (self.call.inputs if self.of_input else self.call.outputs).index(self.value)


class NoCut(Exception):
    """Why there is none."""


def find_cuts(graph: Graph, residuals: Sequence[Residual], seams: Sequence[Seam], path: set[int]) -> list[Cut]:
    """The cuts of a branch, for each module call that returns or takes one.

    Args:
        graph: The forward.
        residuals: The sums that the branch feeds.
        seams: Where it is gated.
        path: Every value that is made from x on the way to its end.

    Raises:
        NoCut: If something that is not made from x would learn from frozen rows.
    """
    finder = _Finder(graph, residuals)
    if not any(seam.of_block for seam in seams):  # which are detached as a whole
        if any(finder.learns(weight, inputs=False) for residual in residuals for weight in residual.weights):
            raise NoCut("the sum weighs both, shortcut and branch, by something that would learn from frozen rows")
        for user, factor in _factors(graph, residuals, {seam.value for seam in seams}, path):
            try:
                finder.cut(user, factor, torch.ones(graph.values[factor].shape, dtype=torch.bool, device="cpu"))
            except NoCut:
                if finder.learns(factor, inputs=False):  # a mask that the model is given, say, teaches nothing
                    raise
    return finder.complete()


def _factors(graph: Graph, residuals: Sequence[Residual], ends: set[int], path: set[int]) -> Iterator[tuple[int, int]]:
    """What is used between the gates and the sums but not made from x, each with the value that is made of it."""
    for residual in residuals:
        for source in residual.factors:
            yield residual.sum, source
    todo, seen = [residual.branch for residual in residuals], set(ends)
    while todo:
        index = todo.pop()
        if index not in seen:
            seen.add(index)
            for source in _made_of(graph.values[index]):
                if source in path:
                    todo.append(source)
                elif graph.values[source].is_data:  # parameters after the gates are refused anyhow
                    yield index, source


def _made_of(node: Value) -> tuple[int, ...]:
    return node.inputs[:1] if node.op in ops.LIKE else tuple(dict.fromkeys(node.inputs))


class _Finder:
    def __init__(self, graph: Graph, residuals: Sequence[Residual]) -> None:
        self.graph, self.values = graph, graph.values
        self.ends = {residual.branch for residual in residuals}
        self.shortcuts = {residual.entry: residual.shortcut for residual in residuals}
        self.found: dict[tuple[str, bool, int], dict[int, Cut]] = {}

    def cut(self, user: int, index: int, wanted: Tensor) -> None:
        """Cut the way from `user` back to the `wanted` elements of a value, or all ways from there on."""
        node = self.values[index]
        if not self.learns(index):
            return
        place = self._place(user, node, wanted)
        if place is not None:
            self._add(place)
            return
        sources = _made_of(node)
        if not sources:
            raise NoCut(f"it is multiplied by {self._called(node)}, which would learn from frozen rows")
        for source in sources:
            origin = self._origin(node, source)
            if origin is None:
                raise NoCut(
                    "it is multiplied by something that is not made from x and is used elsewhere too, or made by the "
                    f"function `{node.op}`, so what it is made of would learn from frozen rows"
                )
            needed = torch.zeros(self.values[source].shape, dtype=torch.bool, device="cpu")
            needed.view(-1)[origin[wanted]] = True
            if needed.any():
                self.cut(index, source, needed)

    def complete(self) -> list[Cut]:
        """What was found; where a module is called several times, it must be cut in all its calls alike."""
        cuts: list[Cut] = []
        for (name, _, _), by_call in self.found.items():
            first = next(iter(by_call.values()))
            if len(by_call) < self.graph.trace.count[name] or any(
                not torch.equal(cut.elements, first.elements) for cut in by_call.values()
            ):
                raise NoCut(f"it is multiplied by what `{name}` makes or takes, which serves other branches too")
            cuts += by_call.values()
        return cuts

    def _add(self, cut: Cut) -> None:
        by_call = self.found.setdefault((cut.call.name, cut.of_input, cut.leaf), {})
        known = by_call.get(cut.call.ordinal)
        elements = cut.elements if known is None else cut.elements | known.elements
        by_call[cut.call.ordinal] = Cut(cut.call, cut.value, cut.of_input, elements)

    def _place(self, user: int, node: Value, wanted: Tensor) -> Cut | None:
        """The nearest call where this value can be cut for `user`."""
        index, count = node.index, self.graph.trace.count
        # What uses a value after a module has returned it, or while a module runs that was given it, sees the cut.
        returned = [(call, False, call.end, _EVER) for call in node.returned_by if call.outputs.count(index) == 1]
        around = sorted(self.graph.owners(user), key=lambda call: -call.begin)
        taken = [(call, True, call.begin, call.end) for call in around if call.inputs.count(index) == 1]
        for call, of_input, begin, end in returned + taken:
            goes_on = index in (call.outputs if of_input else self.graph.outputs)
            if count[call.name] in (1, len(self.shortcuts)) and begin <= user < end and not goes_on:
                seen_by = [
                    u for u in dict.fromkeys(node.users) if begin <= u < end and index in _made_of(self.values[u])
                ]
                if not any(self._escapes(node, u, wanted) for u in seen_by):
                    return Cut(call, index, of_input, wanted)
        return None

    def _escapes(self, node: Value, user: int, wanted: Tensor) -> bool:
        """Do the `wanted` elements of a value reach the model's output through `user`, but not through the branch?"""
        if node.index not in _made_of(self.values[user]):
            return False
        if self.shortcuts.get(user, node.index) != node.index:
            return False  # a sum takes it in as a branch, or a factor of it
        if not self.graph.reaches_output([user], around=self.ends):
            return False
        origin = self._origin(self.values[user], node.index)
        if origin is None:
            return True
        part = wanted.reshape(-1)[origin]
        if not part.any():
            return False
        after = self.values[user]
        return user in self.graph.outputs or any(self._escapes(after, u, part) for u in dict.fromkeys(after.users))

    def learns(self, index: int, inputs: bool = True) -> bool:
        """Can a gradient that comes here go on to a parameter, or to an input of the model?"""
        seen: set[int] = set()
        todo = [index]
        while todo:
            value = self.values[todo.pop()]
            if value.index in seen or not value.is_float:
                continue
            if (inputs and value.op == "input") or value.parameter in self.graph.trainable:
                return True
            seen.add(value.index)
            todo.extend(_made_of(value))
        return False

    def _origin(self, node: Value, source: int) -> Tensor | None:
        """For each element of a value, the element of `source` that it comes from; None for an unknown function."""
        given = self.values[source].shape
        numbers = torch.arange(math.prod(given), device="cpu").view(given)
        try:
            name = node.op if node.op.endswith("__") else node.op.removesuffix("_")
            if name in ops.ELEMENTWISE and not (name == "alias" and len(node.inputs) > 1):
                return numbers.expand(node.shape)
            if node.recipe is None or node.op not in ops.MOVES:
                return None
            forms = {i: torch.empty(self.values[i].shape) for i in node.inputs[1:] if node.op in ops.LIKE}
            args, kwargs = trees.map_leaves(
                lambda leaf: (forms | {source: numbers})[leaf.value] if isinstance(leaf, Ref) else leaf,
                node.recipe.arguments,
            )
            return trees.tensor_at(node.recipe.func(*args, **kwargs), node.recipe.leaf).view(node.shape)
        except Exception:  # of whatever a function does not take in the place of its arguments
            return None

    def _called(self, node: Value) -> str:
        return f"the parameter `{node.parameter}`" if node.parameter else "an input of the model"
