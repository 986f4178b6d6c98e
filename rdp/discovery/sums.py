"""Which functions add, and what.

`a + b` and `a - b` are known by name. Others are tried with numbers: a function is a sum of those values that it is
linear in together, if every number of the result holds one of the first of them. So `torch.lerp(x, f, w)`,
`addmm(x, f, w)`, `x.index_add(1, i, f)` and `stack([x, f]).sum(0)` are sums.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rdp import trees
from rdp.discovery import ops
from rdp.discovery.graph import Graph
from rdp.discovery.records import Ref, Value


@dataclass(frozen=True)
class Sum:
    """What a value is the sum of.

    Attributes:
        index: The value.
        entry: The value that takes in the terms: the sum itself, or the list that is summed.
        terms: The data-dependent values that are added.
        scaled: Those that are not added as they are, but as a multiple.
        partial: Those that not every number of the sum holds one of.
        factors: For each term what it is multiplied by.
    """

    index: int
    entry: int
    terms: tuple[int, ...]
    scaled: frozenset[int] = frozenset()
    partial: frozenset[int] = frozenset()
    factors: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def sum_of(graph: Graph, node: Value) -> Sum | None:
    """What `node` is the sum of; None if it is no sum of several values that depend on data."""
    if not (node.is_float and node.is_data):
        return None
    operands = [i for i in dict.fromkeys(node.inputs) if graph.values[i].is_data and graph.values[i].is_float]
    if node.op in ops.ADD | ops.SUBTRACT and len(node.inputs) == 2:
        if len(operands) < 2:
            return None
        broadcast = frozenset(i for i in operands if graph.values[i].shape != node.shape)
        return Sum(node.index, node.index, tuple(operands), _multiples(graph, node, operands), broadcast)
    try:
        return _tried(graph, node, operands)
    except Exception:  # of whatever a function does not take in the place of its arguments
        return None


def _multiples(graph: Graph, node: Value, operands: list[int]) -> frozenset[int]:
    """The operands that `a + b` or `a - b` takes in with a factor, as the second of `torch.add(a, b, alpha=0.5)`."""
    if node.op in ops.ADD and (node.recipe is None or "alpha" not in node.recipe.arguments[1]):
        return frozenset()
    zero, one = torch.zeros((), device="cpu"), torch.ones((), device="cpu")

    def multiple(term: int) -> Tensor:
        return _value(graph, {node.index}, node.index, {i: one if i == term else zero for i in operands})

    try:
        return frozenset(i for i in operands if multiple(i) != 1)
    except Exception:  # as above
        return frozenset(operands)


def _tried(graph: Graph, node: Value, operands: list[int]) -> Sum | None:
    chain = {node.index}
    entry = node
    if node.op in ops.REDUCE:
        found = next(filter(None, (_listed(graph, i, chain) for i in operands)), None)
        if found is None:
            return None
        entry, chain = found
        operands = [i for i in dict.fromkeys(entry.inputs) if graph.values[i].is_data and graph.values[i].is_float]
    elif node.op in ops.NO_SUM or node.recipe is None:
        return None
    size = math.prod(node.shape)
    shapes = {i: graph.values[i].shape for i in operands}
    fitting = [i for i in operands if shapes[i] == node.shape or (entry is not node and math.prod(shapes[i]) == size)]
    if len(operands) < 2 or not fitting or not (node.op in ops.ADD or _depend(graph, operands)):
        return None
    trial = functools.partial(_Trial, graph, chain, node)
    for first in fitting:
        terms = [first]
        # Of two factors the branch is what is made from the first term, and last.
        of_first = {i for i in operands if graph.strip(first) in graph.ancestors(i, graph.strip(first))}
        for other in sorted(set(operands) - {first}, key=lambda i: (i in of_first, i), reverse=True):
            if trial([*terms, other]).linear():
                terms.append(other)
        numbers = trial(terms)
        if len(terms) > 1 and numbers.fills(first):
            terms.sort(key=operands.index)
            return Sum(
                node.index,
                entry.index,
                tuple(terms),
                scaled=frozenset(t for t in terms if not numbers.passes(t)),
                partial=frozenset(t for t in terms if not numbers.fills(t)),
                factors={t: numbers.factors(t) for t in terms},
            )
    return None


def _listed(graph: Graph, index: int, chain: set[int]) -> tuple[Value, set[int]] | None:
    """The list of values, put together, that a value is a view of; and what lies in between."""
    node, chain = graph.values[index], chain | {index}
    if node.op in ops.CONCATENATE:
        return node, chain
    if node.op not in ops.VIEW | ops.SCALE:
        return None
    return next(filter(None, (_listed(graph, i, chain) for i in node.inputs if graph.values[i].is_data)), None)


def _depend(graph: Graph, operands: list[int]) -> bool:
    """Is one of them made from another?"""
    return any(a in graph.ancestors(b, a) for a, b in itertools.permutations(map(graph.strip, operands), 2) if a < b)


def _value(graph: Graph, chain: set[int], index: int, given: Mapping[int, Tensor]) -> Tensor:
    """A value made anew from given numbers, by the functions of `chain`, each of which has made one value."""
    recipe = graph.values[index].recipe
    if index not in chain or recipe is None:
        return given[index]
    args, kwargs = trees.map_leaves(
        lambda leaf: _value(graph, chain, leaf.value, given).clone() if isinstance(leaf, Ref) else leaf,
        recipe.arguments,
    )
    output = recipe.func(*args, **kwargs)
    return [*trees.tensors(output), *trees.tensors((args, kwargs))][recipe.leaf]


class _Trial:
    """What comes out of random numbers in the place of some values."""

    def __init__(self, graph: Graph, chain: set[int], node: Value, terms: list[int]) -> None:
        self.graph, self.chain, self.node, self.terms = graph, chain, node, terms
        generator = torch.Generator("cpu").manual_seed(0)
        self.leaves = sorted({i for value in chain for i in graph.values[value].inputs} - chain)
        self.first, self.second = ({i: self._stand_in(i, generator) for i in self.leaves} for _ in range(2))

    def _stand_in(self, index: int, generator: torch.Generator) -> Tensor:
        value = self.graph.values[index]
        if not value.is_float:
            return torch.zeros(value.shape, dtype=torch.int64, device="cpu")
        return 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu")

    def _made(self, terms: Mapping[int, Tensor], others: Mapping[int, Tensor] | None = None) -> Tensor:
        zeros = {i: torch.zeros_like(self.first[i]) for i in self.terms}
        given = {**(self.first if others is None else others), **zeros, **terms}
        return _value(self.graph, self.chain, self.node.index, given)

    def linear(self) -> bool:
        """Is it linear in its terms together, but for what is added besides?"""
        one, other = ({i: numbers[i] for i in self.terms} for numbers in (self.first, self.second))
        both = self._made({i: one[i] - 2 * other[i] for i in self.terms})
        return torch.allclose(both, self._made(one) - 2 * self._made(other) + 2 * self._made({}))

    def fills(self, term: int) -> bool:
        """Is every number of the result a multiple of one of the term's, at its place?"""
        one, other = self._alone(term, self.first), self._alone(term, self.second)
        given = [self._placed(term, numbers) for numbers in (self.first, self.second)]
        if given[0] is None or given[1] is None or not (one != 0).all():
            return False
        return torch.allclose(one / given[0], other / given[1])

    def passes(self, term: int) -> bool:
        """Is it the term itself that is added?"""
        given = self._placed(term, self.first)
        return given is not None and torch.allclose(self._alone(term, self.first), given)

    def factors(self, term: int) -> tuple[int, ...]:
        """What the term is multiplied by."""
        alone = self._alone(term, self.first)

        def matters(index: int) -> bool:
            changed = {**self.first, index: self.second[index]}
            return not torch.allclose(self._made({term: self.first[term]}, changed), alone)

        return tuple(i for i in self.leaves if i not in self.terms and self.graph.values[i].is_float and matters(i))

    def _alone(self, term: int, numbers: Mapping[int, Tensor]) -> Tensor:
        return self._made({term: numbers[term]})

    def _placed(self, term: int, numbers: Mapping[int, Tensor]) -> Tensor | None:
        """The numbers of a term in the form of the sum."""
        given = numbers[term]
        return given.reshape(self.node.shape) if given.numel() == math.prod(self.node.shape) else None
