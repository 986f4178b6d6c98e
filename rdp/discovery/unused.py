"""What of a model is for nothing once some values are taken away: the modules and parameters that serve these alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from rdp.discovery import ops
from rdp.discovery.graph import Graph
from rdp.discovery.records import Call

_KEEP = ops.VIEW | ops.SLICE | ops.SCALE | ops.KEEPS_ZERO
"""A product is zero if a factor is, a quotient if the first value is, and so with functions of one value."""


class Unused:
    """What a forward needs no more.

    Args:
        graph: The forward.
        zeros: Values in whose place there are zeros; the attribute has those too that are zero with them.
        passed: Values in whose place there is another: what a block was given, in the place of what it returns.
    """

    def __init__(self, graph: Graph, zeros: Iterable[int], passed: Mapping[int, int]) -> None:
        self._graph = graph
        self.zeros = _and_products(graph, zeros)
        self._before = _reaching_output(graph, frozenset(), {})
        self._after = _reaching_output(graph, self.zeros, passed)

    def is_looked_at(self, value: int) -> bool:
        """Is the output made of this value still?"""
        return value in self._after

    def modules(self) -> dict[str, list[Call]]:
        """The modules of which nothing is needed any more, by name, in the order of their calls."""
        calls: dict[str, list[Call]] = defaultdict(list)
        for call in self._graph.trace.calls:
            calls[call.name].append(call)
        # A module inside, or a parameter, may be used from elsewhere too.
        needed = {name for name, each in calls.items() if not self._made(each).isdisjoint(self._after)}
        needed |= {name for value in self._graph.values if value.index in self._after and (name := value.parameter)}
        around = {name[:end] for name in needed for end, letter in enumerate(name) if letter == "."}
        unused = {name: each for name, each in calls.items() if name and name not in needed | around}
        return {name: each for name, each in unused.items() if self._is_unused(each)}

    def parameters(self) -> set[str]:
        """The parameters that were of use, and are needed no more."""
        uses: dict[str, set[int]] = defaultdict(set)
        for value in self._graph.values:
            if value.parameter in self._graph.trainable:
                uses[value.parameter].add(value.index)
        return {
            name for name, each in uses.items() if not each.isdisjoint(self._before) and each.isdisjoint(self._after)
        }

    def layer(self, parameters: Collection[str]) -> tuple[str, str] | None:
        """One of these parameters that a layer's function takes, and that function; None if there is none."""
        for value in self._graph.values:
            if value.op in ops.WEIGHTED and (taken := self._graph.parameters([value.index]).intersection(parameters)):
                return min(taken), value.op
        return None

    def _made(self, calls: list[Call]) -> set[int]:
        values = self._graph.values
        return {i for call in calls for i in range(call.begin, min(call.end, len(values))) if values[i].is_data}

    def _is_unused(self, calls: list[Call]) -> bool:
        """Is nothing of what they made or returned needed, and was it of use before?"""
        made, returned = self._made(calls), {i for call in calls for i in call.outputs}
        was_of_use = not made.isdisjoint(self._before) or not returned.isdisjoint(self.zeros)
        return was_of_use and made.isdisjoint(self._after) and returned.isdisjoint(self._after)


def _reaching_output(graph: Graph, zeros: frozenset[int], passed: Mapping[int, int]) -> set[int]:
    """The values that the model's output is made of."""
    seen: set[int] = set()
    todo = list(graph.outputs)
    while todo:
        index = todo.pop()
        if index in passed:
            todo.append(passed[index])
        elif index not in seen and index not in zeros:
            seen.add(index)
            inputs = graph.values[index].inputs
            nothing = graph.values[index].op.startswith("addcmul") and not zeros.isdisjoint(inputs[1:])
            todo.extend(inputs[:1] if nothing else inputs)
    return seen


def _and_products(graph: Graph, zeros: Iterable[int]) -> frozenset[int]:
    """These values, and those that are zero with them, so that their other factors are of no use."""
    found = set(zeros)
    for node in graph.values[min(found, default=0) :]:
        # What was written to through an alias is made of both.
        zero = [i in found for i in (node.inputs if node.op.startswith(("mul", "alias")) else node.inputs[:1])]
        if node.op in _KEEP and zero and (any(zero) if node.op.startswith("mul") else all(zero)):
            found.add(node.index)
    return frozenset(found)
