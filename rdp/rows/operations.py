"""Turning recorded calls into the operations of a program, with arguments for any number of rows."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import nn

from rdp import trees
from rdp.branches import RowAxis
from rdp.discovery.graph import Graph
from rdp.discovery.records import Arguments, Call, Ref
from rdp.rows.arguments import Named, Outside, Rows
from rdp.rows.program import Operation
from rdp.rows.twins import Twins

_PLAIN = (bool, int, float, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format)


class NotIndependent(Exception):
    """Why a branch cannot be run on some of the rows."""


class Writer:
    """Turns recorded calls into operations.

    Args:
        graph: Of a forward of two rows.
        twins: Of the same forward of one row.
        model: The traced model.
        around: The calls that were running when the branch was added.
        entry: The first module.
        path: The values of the branch.
        fork: The value x.

    Attributes:
        inside: The values that have some of the rows, once the first module was called with some.
        operations: What was written.
    """

    def __init__(
        self, graph: Graph, twins: Twins, model: nn.Module, around: set[Call], entry: Call, path: set[int], fork: int
    ) -> None:
        self.graph, self.twins, self._model = graph, twins, model
        self.inside = {value for value in path if entry.begin <= value < entry.end}
        for value in sorted(path):
            if value >= entry.end and not self.inside.isdisjoint(graph.values[value].inputs):
                self.inside.add(value)
        self.operations: list[Operation] = []
        self._around = around
        self._latest = entry
        self._taken = path | {fork}

    def concerns(self, item: Call | int) -> bool:
        """Has it to do with values that have some of the rows?"""
        if not isinstance(item, Call):
            return item in self.inside
        return passes_through(item, self.inside) or not self.inside.isdisjoint(range(item.begin, item.end))

    def write(self, item: Call | int) -> None:
        """Append the operation of a module call, or of the function that made a value."""
        if isinstance(item, Call):
            self._write_call(item)
            if self.operations[-1].taken:
                self._latest = item
            return
        recipe, twin = self.graph.values[item].recipe, self.twins.arguments(item)
        if recipe is None:
            raise NotIndependent("a value was written through an alias")
        if twin is None:
            raise NotIndependent("the model computes differently for one row")
        arguments = self._merge(recipe.arguments, twin, in_module=False)
        self.operations.append(Operation(recipe.func, arguments, (*[None] * recipe.leaf, item)))

    def _write_call(self, call: Call) -> None:
        if _side_outputs(self.graph, self.twins, call, self.inside):
            raise NotIndependent(f"`{call.name}` makes something else of the rows, too")
        twin = self.twins.call(call)
        if twin is None:
            raise NotIndependent("the model computes differently for one row")
        arguments = self._merge(call.arguments, twin.arguments, in_module=True)
        outputs = tuple(i if i in self.inside else None for i in call.outputs)
        unhooked = len(trees.leaves(arguments)) == 1 and (
            passes_through(call, self.inside) or _is_function(self._model.get_submodule(call.name))
        )
        self.operations.append(Operation(call.name, arguments, outputs, unhooked))

    def _write_aside(self, index: int) -> None:
        """What a bare function takes from outside can have the same rows if a module makes it just before."""
        owner = self.graph.values[index].owner
        calls = [call for call in owner.chain() if call not in self._around] if owner is not None else []
        begin, item = (calls[-1].begin, calls[-1]) if calls else (index, index)
        if begin < self._latest.end:
            raise NotIndependent("a bare function takes a tensor from outside of the branch")
        made = range(begin, calls[-1].end) if calls else [index]
        self.inside |= {value for value in made if self.graph.values[value].is_data}
        if any(call.parent in self._around for call in silent_calls(self.graph, {*made})):
            raise NotIndependent("a module that does nothing in eval mode takes a tensor from outside of the branch")
        self.write(item)

    def _merge(self, two: Arguments, one: Arguments, in_module: bool) -> Arguments:
        """Arguments for any number of rows, from those for two rows and for one."""
        pair, single = trees.leaves(two), trees.leaves(one)
        if pair.keys() != single.keys():
            raise NotIndependent("an argument changes its length with the batch")
        merged = {path: self._merge_leaf(leaf, single[path], in_module) for path, leaf in pair.items()}
        arguments: Arguments = trees.with_leaves(two, {p: leaf for p, leaf in merged.items() if leaf is not pair[p]})
        return arguments

    def _merge_leaf(self, two: Any, one: Any, in_module: bool) -> Any:
        if type(two) is not type(one):
            raise NotIndependent("an argument changes its type with the batch")
        if isinstance(two, Ref):
            return self._merge_tensor(two, one, in_module)
        if not isinstance(two, _PLAIN):
            raise NotIndependent(f"an argument is a {type(two).__name__}, which may have a state")
        if two == one:
            return two
        if isinstance(two, int) and two == 2 * one:
            return Rows(int(one))
        raise NotIndependent("an argument depends on the batch")

    def _merge_tensor(self, two: Ref, one: Ref, in_module: bool) -> Any:
        value = self.graph.values[two.value]
        if not self.twins.are(two.value, one.value):
            raise NotIndependent("the model computes differently for one row")
        if two.value in (self.inside if self.operations else self._taken):
            return two
        if value.parameter is not None:
            return Named(value.parameter)
        if not in_module:
            if value.is_data:
                self._write_aside(two.value)
            else:
                self.inside.add(two.value)  # a parameter in another form: make it again
                self.write(two.value)
            return two
        shape = value.shape
        return Outside(row_axis(self.graph, self.twins, two.value), shape[0] if shape else 0)


def row_axis(graph: Graph, twins: Twins, index: int) -> RowAxis | None:
    """The axis on which a value has its rows; None if it has none, and is the same for every batch."""
    axis = twins.row_axis(index)
    if axis is None and not twins.alike(index):
        raise NotIndependent("an argument's shape follows the batch in an unclear way")
    return axis


def passes_through(call: Call, path: set[int]) -> bool:
    """Does a module do nothing to these values in eval mode?"""
    return call.begin == call.end and call.outputs[:1] == call.inputs[:1] and bool(path & set(call.outputs))


def silent_calls(graph: Graph, path: set[int]) -> list[Call]:
    """The calls of modules that do nothing to one of these values in eval mode."""
    calls = (call for index in sorted(path) for call in graph.values[index].returned_by)
    return list(dict.fromkeys(call for call in calls if passes_through(call, path)))


def _side_outputs(graph: Graph, twins: Twins, call: Call, inside: set[int]) -> list[int]:
    """Values that a module of the branch makes of other tensors than x, and that are used elsewhere, with all rows.

    A gate from outside, for example, that a norm returns beside its own output.
    """

    def follows_batch(value: int) -> bool:
        return not all(map(twins.alike, {value} | graph.ancestors(value, since=0)))

    def used_elsewhere(value: int) -> bool:
        users = [user for user in graph.values[value].users if not call.begin <= user < call.end]
        return graph.reaches_output(users + [value] * (value in graph.outputs), around=())

    made = range(call.begin, min(call.end, len(graph.values)))
    return [value for value in made if value not in inside and used_elsewhere(value) and follows_batch(value)]


def _is_function(module: nn.Module) -> bool:
    """Is a module no more than a function of one tensor: an activation, say, that many share?"""
    stateless = next(itertools.chain(module.parameters(), module.buffers()), None) is None
    return stateless and len(inspect.signature(module.forward).parameters) == 1
