"""Writing a traced branch down as a program, or saying why it cannot be run on some of the rows.

Everything below the adding module's own level is a module call, whose Python code makes of its input what it likes.
What the adding module itself does between those calls is recorded as functions with their arguments. An integer
argument that doubles with the batch is a multiple of the number of rows.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rdp import trees
from rdp.branches import RowAxis
from rdp.discovery.graph import Graph
from rdp.discovery.residuals import Residual
from rdp.discovery.seams import Seam
from rdp.discovery.trace import Arguments, Call, Ref
from rdp.rows.arguments import Named, Outside, Rows
from rdp.rows.axes import row_axis
from rdp.rows.program import Operation, Program

_PLAIN = (bool, int, float, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format)


class NotIndependent(Exception):
    """Why a branch cannot be run on some of the rows."""


def branch_program(
    graph: Graph, single: Graph, model: nn.Module, residual: Residual, seam: Seam, allow_batch_norm: bool = False
) -> Program:
    """Write down the branch of `residual` as a program.

    Args:
        graph: Of a forward of two rows.
        single: Of the same forward of one row.
        model: The traced model.
        residual: The sum that the branch feeds.
        seam: Where the branch ends.
        allow_batch_norm: Accept batch normalisation.

    Raises:
        NotIndependent: If that is not possible, or an operation couples the rows.
    """
    if len(graph.values) != len(single.values):
        raise NotIndependent("the model computes differently for one row")
    path = graph.between(residual.fork, seam.value)
    aside = {user for i in path - {seam.value} for user in graph.values[i].users} - path
    if graph.reaches_output(aside, around=()):
        raise NotIndependent("its modules serve something else too")
    around = graph.owners(residual.sum)
    if any(value in path and caller in around for value, caller in graph.trace.dropouts):
        raise NotIndependent("a bare function applies dropout")
    writer = _Writer(graph, single, residual, path)
    for item in itertools.dropwhile(lambda item: not isinstance(item, Call), _sequence(graph, residual, path)):
        if isinstance(item, Call) and _side_outputs(graph, single, item, path):
            raise NotIndependent(f"`{item.name}` makes something else of the rows, too")
        writer.write(item)
    operations = writer.operations
    start = _start(operations[0], path | {residual.fork})
    _check_chain(operations, start, path | {residual.fork})
    axes: dict[int, RowAxis] = {}
    batch_norm = False
    for operation in operations:
        if isinstance(operation.target, str):
            has_batch_norm = _check_module(graph, model, operation.target, once=not operation.silent)
            if has_batch_norm and not allow_batch_norm:
                raise NotIndependent(f"{has_batch_norm}, see compute='ghost'")
            batch_norm |= bool(has_batch_norm)
            axes |= {value: _needed_row_axis(graph, single, value) for value in operation.taken}
    axes[seam.value] = _needed_row_axis(graph, single, seam.value)
    shape, result_leaf = graph.values[start].shape, seam.call.outputs.index(seam.value)
    kind = (*(graph.values[value].op for value in sorted(path)), *_classes(model, operations))
    return Program(start, seam.value, tuple(operations), axes, shape, result_leaf, batch_norm, kind)


def _side_outputs(graph: Graph, single: Graph, call: Call, path: set[int]) -> list[int]:
    """Values that a module of the branch makes of other tensors than x, and that are used elsewhere, with all rows.

    A gate from outside, for example, that a norm returns beside its own output.
    """

    def follows_batch(value: int) -> bool:
        return any(graph.values[i].shape != single.values[i].shape for i in {value} | graph.ancestors(value, since=0))

    def used_elsewhere(value: int) -> bool:
        users = [user for user in graph.values[value].users if not call.begin <= user < call.end]
        return graph.reaches_output(users + [value] * (value in graph.outputs), around=())

    made = range(call.begin, min(call.end, len(graph.values)))
    return [value for value in made if value not in path and used_elsewhere(value) and follows_batch(value)]


def _classes(model: nn.Module, operations: list[Operation]) -> list[str]:
    called = [model.get_submodule(operation.target) for operation in operations if isinstance(operation.target, str)]
    kinds = [type(inner) for module in called for inner in module.modules()]
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]


def _start(first: Operation, inside: set[int]) -> int:
    """The one value of the branch that its first module takes."""
    taken = first.taken.keys() & inside
    if len(taken) != 1:
        raise NotIndependent("its first module takes several tensors of the branch")
    return taken.pop()


def _check_chain(operations: list[Operation], start: int, inside: set[int]) -> None:
    """No operation reaches back beyond the latest module call before it."""
    reachable = {start}
    for operation in operations:
        if not operation.taken.keys() & inside <= reachable:
            raise NotIndependent("the branch is not a chain of modules")
        made = {value for value in operation.outputs if value is not None}
        reachable = made if isinstance(operation.target, str) else reachable | made


def _sequence(graph: Graph, residual: Residual, path: set[int]) -> list[Call | int]:
    """The outermost module calls, and the values made by bare functions, that lead from the fork to the end."""
    around = graph.owners(residual.sum)
    sequence: list[Call | int] = []
    for index in sorted(path):
        owner = graph.values[index].owner
        inner = [call for call in owner.chain() if call not in around] if owner is not None else []
        if inner and inner[-1].begin <= residual.fork:
            raise NotIndependent("the fork lies inside a module of the branch")
        item: Call | int = inner[-1] if inner else index
        if item not in sequence:
            sequence.append(item)
    # Modules that pass their input through in eval mode, such as Dropout, made no value but are called all the same.
    silent = [
        call
        for call in graph.trace.calls
        if call.parent in around and call not in around and _passes_through(call, path) and call.end <= residual.sum
    ]
    # A silent call is over when the next value is made.
    when = [(call.begin, 0) for call in silent] + [(i.begin if isinstance(i, Call) else i, 1) for i in sequence]
    order = sorted(range(len(when)), key=when.__getitem__)
    return [[*silent, *sequence][i] for i in order]


def _passes_through(call: Call, path: set[int]) -> bool:
    return call.begin == call.end and call.outputs[:1] == call.inputs[:1] and bool(path & set(call.outputs))


class _Writer:
    """Turns recorded calls into operations."""

    def __init__(self, graph: Graph, single: Graph, residual: Residual, path: set[int]) -> None:
        self.graph, self.single = graph, single
        self.inside = path | {residual.fork}
        self.operations: list[Operation] = []

    def write(self, item: Call | int) -> None:
        """Append the operation of a module call, or of the function that made a value."""
        if isinstance(item, Call):
            twin = next(c for c in self.single.trace.calls if c.name == item.name and c.ordinal == item.ordinal)
            arguments = self._merge(item.arguments, twin.arguments, in_module=True)
            outputs = tuple(i if i in self.inside else None for i in item.outputs)
            operation = Operation(item.name, arguments, outputs)
            silent = _passes_through(item, self.inside) and len(operation.leaves) == 1
            self.operations.append(replace(operation, silent=silent))
            return
        recipe, twin_recipe = self.graph.values[item].recipe, self.single.values[item].recipe
        if recipe is None or twin_recipe is None:
            raise NotIndependent("a value was written through an alias")
        arguments = self._merge(recipe.arguments, twin_recipe.arguments, in_module=False)
        self.operations.append(Operation(recipe.func, arguments, (*[None] * recipe.leaf, item)))

    def _merge(self, two: Arguments, one: Arguments, in_module: bool) -> Arguments:
        """Arguments for any number of rows, from those for two rows and for one."""
        pair, single = trees.leaves(two), trees.leaves(one)
        if pair.keys() != single.keys():
            raise NotIndependent("an argument changes its length with the batch")
        merged = iter([self._merge_leaf(leaf, single[path], in_module) for path, leaf in pair.items()])
        arguments: Arguments = trees.map_leaves(lambda _: next(merged), two)
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
        if two.value != one.value:
            raise NotIndependent("the model computes differently for one row")
        if two.value in self.inside:
            return two
        if value.parameter is not None:
            return Named(value.parameter)
        if not in_module:
            if value.is_data:
                raise NotIndependent("a bare function takes a tensor from outside of the branch")
            self.inside.add(two.value)  # a parameter in another form: make it again
            self.write(two.value)
            return two
        shape = value.shape
        return Outside(_row_axis(self.graph, self.single, two.value), shape[0] if shape else 0)


def _row_axis(graph: Graph, single: Graph, index: int) -> RowAxis | None:
    """The axis on which a value has its rows; None if it has none, and is the same for every batch."""
    two, one = graph.values[index].shape, single.values[index].shape
    axis = row_axis(two, one)
    if axis is None and two != one:
        raise NotIndependent("an argument's shape follows the batch in an unclear way")
    return axis


def _needed_row_axis(graph: Graph, single: Graph, index: int) -> RowAxis:
    axis = _row_axis(graph, single, index)
    if axis is None:
        raise NotIndependent("a value in the branch is the same for every batch")
    return axis


def _check_module(graph: Graph, model: nn.Module, name: str, once: bool) -> str:
    """The kind of batch normalisation inside, or ""."""
    batch_norm = ""
    if once and graph.trace.count[name] > 1:
        raise NotIndependent(f"`{name}` is called several times")
    for module in model.get_submodule(name).modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            batch_norm = kind
        elif isinstance(module, nn.modules.batchnorm._NormBase) and (
            isinstance(module, nn.SyncBatchNorm) or module.track_running_stats  # of instance norms
        ):
            raise NotIndependent(kind)
        if torch.nn.utils.parametrize.is_parametrized(module):
            raise NotIndependent("a parametrization may have a state")
    return batch_norm
