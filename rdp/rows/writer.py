"""Writing a traced branch down as a program, or saying why it cannot be run on some of the rows.

Everything below the adding module's own level is a module call, whose Python code makes of its input what it likes.
What the adding module itself does between those calls is recorded as functions with their arguments. An integer
argument that doubles with the batch is a multiple of the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from rdp.branches import RowAxis
from rdp.discovery.graph import Graph
from rdp.discovery.records import Call
from rdp.discovery.residuals import Residual
from rdp.discovery.seams import Seam
from rdp.rows.cost import work
from rdp.rows.operations import NotIndependent, Writer, passes_through, row_axis, silent_calls
from rdp.rows.program import Operation, Program
from rdp.rows.twins import Twins

_LEAST_SHARE = 0.25
"""Of the operations of a branch, what must be left to run on rows where not all of it can."""


def branch_programs(
    graph: Graph, twins: Twins, model: nn.Module, residual: Residual, seam: Seam, allow_batch_norm: bool = False
) -> Iterator[Program]:
    """Write down the branch of `residual` as a program: as a whole, and what follows each of its modules.

    What cannot run on some of the rows, such as a function that takes a tensor from outside, may come before that which
    can; it is then run on all of them, in the model's own forward.

    Args:
        graph: Of a forward of two rows.
        twins: Of the same forward of one row.
        model: The traced model.
        residual: The sum that the branch feeds.
        seam: Where the branch ends.
        allow_batch_norm: Accept batch normalisation.

    Yields:
        One program after the other, each shorter than the one before, as long as they hold a good part of the work.

    Raises:
        NotIndependent: If there is none; why there is no longer one.
    """
    path = graph.between(residual.fork, seam.value)
    sequence, why = _sequence(graph, residual, path), None
    whole = work(graph, path, ()).operations
    for number, item in enumerate(sequence):
        if not isinstance(item, Call) or passes_through(item, path):
            continue
        rest = work(graph, {i for i in path if i >= item.begin}, ()).operations
        if number and (not rest or rest < _LEAST_SHARE * whole):
            break
        try:
            program = _program(graph, twins, model, residual, seam, path, sequence[number:], allow_batch_norm)
        except NotIndependent as reason:
            why = why or reason
        else:
            yield program if why is None else replace(program, why_not_before=str(why))
            why = NotIndependent("")
    if why is None or str(why):
        raise why or NotIndependent("no module is called in it")


def _program(
    graph: Graph,
    twins: Twins,
    model: nn.Module,
    residual: Residual,
    seam: Seam,
    path: set[int],
    sequence: list[Call | int],
    allow_batch_norm: bool,
) -> Program:
    """The program that begins with the first call of `sequence`.

    Raises:
        NotIndependent: If there is none, or an operation couples the rows.
    """
    around = graph.owners(residual.sum)
    entry = sequence[0]
    assert isinstance(entry, Call)
    writer = Writer(graph, twins, model, around, entry, path, residual.fork)
    for item in sequence:
        if item is entry or writer.concerns(item):
            if isinstance(item, Call) and item.begin <= residual.fork:
                raise NotIndependent("the fork lies inside a module of the branch")
            writer.write(item)
    operations, inside = writer.operations, writer.inside
    if any(value in inside and caller in around for value, caller in graph.trace.dropouts):
        raise NotIndependent("a bare function applies dropout")
    cut = {value for value in inside - {seam.value} if graph.values[value].is_data}
    aside = {user for value in cut for user in graph.values[value].users} - inside
    if graph.reaches_output(aside, around=()):
        raise NotIndependent("its modules serve something else too")
    start = _start(operations[0], path | {residual.fork})
    _check_chain(operations, start, inside | {start})
    axes: dict[int, RowAxis] = {}
    batch_norm = False
    for operation in operations:
        if isinstance(operation.target, str):
            has_batch_norm = _check_module(graph, model, operation, is_entry=operation is operations[0])
            if has_batch_norm and not allow_batch_norm:
                raise NotIndependent(f"{has_batch_norm}, see compute='ghost'")
            batch_norm |= bool(has_batch_norm)
            axes |= {value: _needed_row_axis(graph, twins, value) for value in operation.taken}
    axes[seam.value] = _needed_row_axis(graph, twins, seam.value)
    shape, result_leaf = graph.values[start].shape, seam.call.outputs.index(seam.value)
    kind = (*(graph.values[value].op for value in sorted(inside)), *_classes(model, operations))
    done = work(graph, inside, [start, seam.value])
    return Program(start, seam.value, tuple(operations), axes, shape, result_leaf, batch_norm, kind, work=done)


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
        # A module that takes nothing of the branch may stand between a value and its use.
        reachable = made if isinstance(operation.target, str) and operation.taken else reachable | made


def _sequence(graph: Graph, residual: Residual, path: set[int]) -> list[Call | int]:
    """The outermost module calls, and the values made by bare functions, that lead from the fork to the end."""
    around = graph.owners(residual.sum)
    sequence: list[Call | int] = []
    for index in sorted(path):
        owner = graph.values[index].owner
        inner = [call for call in owner.chain() if call not in around] if owner is not None else []
        item: Call | int = inner[-1] if inner else index
        if item not in sequence:
            sequence.append(item)
    # Modules that pass their input through in eval mode, such as Dropout, made no value but are called all the same.
    silent = [
        call
        for call in silent_calls(graph, path)
        if call.parent in around and call not in around and call.end <= residual.sum
    ]
    # A silent call is over when the next value is made.
    when = [(call.begin, 0) for call in silent] + [(i.begin if isinstance(i, Call) else i, 1) for i in sequence]
    order = sorted(range(len(when)), key=when.__getitem__)
    return [[*silent, *sequence][i] for i in order]


def _needed_row_axis(graph: Graph, twins: Twins, index: int) -> RowAxis:
    axis = row_axis(graph, twins, index)
    if axis is None:
        raise NotIndependent("a value in the branch is the same for every batch")
    return axis


def _check_module(graph: Graph, model: nn.Module, operation: Operation, is_entry: bool) -> str:
    """The kind of batch normalisation inside, or ""."""
    name, batch_norm = str(operation.target), ""
    if graph.trace.count[name] > 1 and (is_entry or not operation.unhooked):
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
