"""Running a branch only on the rows that a step needs.

In DROP the branch's first module gets the undropped rows alone, and the gate at its end puts zeros in the others'
places. Where no row is left, a single one is run (two for batch normalisation, whose running statistics do not keep
them), since a hook cannot keep the model from calling the branch. In FREEZE
the model's own call runs the undropped rows, whose gradient is stopped anyway; the dropped rows, the only ones that
learn, are run by replaying the branch as a program.

Should the model call a module of the branch otherwise than when the branch was found (an attention mask where there
was none), the rows are put together again in front of that module, and the rest runs on all of them.

The idea is DINOv2's `drop_add_residual_stochastic_depth`, without touching the model's code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.branches import RowAxis
from rdp.discovery.trace import Arguments, Ref
from rdp.errors import ForwardError
from rdp.rows.arguments import Leaves, Named, Outside, Rows, as_recorded
from rdp.rows.program import Operation, Program
from rdp.trees import Path


@dataclass
class Split:
    """The rows of one forward of one branch, as int64 `Tensor[rows]` each; together they are all rows."""

    kept: Tensor
    dropped: Tensor
    total: int = field(init=False)
    """The number of rows of the batch."""

    def __post_init__(self) -> None:
        self.total = len(self.kept) + len(self.dropped)


@dataclass
class _Passing:
    """What is remembered between a branch's first module and its gate."""

    split: Split
    freeze: bool
    x: Tensor
    unused: bool = False
    """Are the rows that run run for nothing?"""
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """If so, running statistics, each with a copy of what they were before."""
    calls: dict[str, tuple[Arguments, Leaves]] = field(default_factory=dict)


class BranchOnRows:
    """A branch that runs on some of the rows; its hooks call `enter`, `later` and `leave`, in this order.

    Args:
        model: The model that the program is of.
        program: The branch.

    Attributes:
        replaying: Are the hooks called by `replay`, and have nothing to do?
        passing: What is known since the branch was entered with some of its rows; None outside of it.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model = model
        self.program = program
        self.replaying = False
        self.passing: _Passing | None = None
        self._numbers = {
            operation.target: i for i, operation in enumerate(program.operations) if isinstance(operation.target, str)
        }

    def enter(self, given: Arguments, split_on: Callable[[torch.device], Split], freeze: bool) -> Arguments | None:
        """The arguments of the branch's first module, cut to the undropped rows; None if the branch must run dense.

        Args:
            given: Those that the model gives.
            split_on: Returns the rows, on a device.
            freeze: Will dropped rows be run by `replay`?
        """
        program, operation, leaves = self.program, self.program.operations[0], trees.leaves(given)
        x, where = leaves.get(operation.taken[program.start]), program.axes[program.start]
        if not isinstance(x, Tensor):
            return None
        split = split_on(x.device)
        shape = list(program.shape)
        shape[where.axis] = entries = split.total * where.fold
        if not as_recorded(operation.leaves, leaves, split.total, split.total) or (
            list(x.shape) != shape and not (program.fits_any_shape and x.shape[where.axis] == entries)
        ):
            return None
        statistics = []
        if unused := not len(split.kept):
            few = 2 if program.batch_norm else 1
            split = Split(split.dropped[:few], split.dropped[few:])
            statistics = [(b, b.clone()) for norm in self._tracking_norms() for b in norm.buffers(recurse=False)]
        self.passing = _Passing(split, freeze, x, unused, statistics, {str(operation.target): (given, leaves)})
        return self._filled(operation, given, leaves, {program.start: _take(x, where, split.kept)}, split.kept)

    def later(self, name: str, given: Arguments) -> Arguments:
        """The arguments of a later module: those from outside of the branch are cut to the undropped rows."""
        assert self.passing is not None
        passing, operation, leaves = self.passing, self.program.operations[self._numbers[name]], trees.leaves(given)
        if not as_recorded(operation.leaves, leaves, passing.split.total, len(passing.split.kept)):
            reunited = self._reunited(name, given, leaves, passing)
            self._leave()
            return reunited
        passing.calls[name] = given, leaves
        return self._filled(operation, given, leaves, _inner(operation, leaves), passing.split.kept)

    def replay(self, operations: int | None = None) -> dict[int, Tensor]:
        """Run the branch on the dropped rows, or the first `operations` operations of it; the values that they make."""
        assert self.passing is not None
        passing, rows = self.passing, self.passing.split.dropped
        env = {self.program.start: _take(passing.x, self.program.axes[self.program.start], rows)}
        with self._in_replay():
            for operation in self.program.operations[:operations]:
                if isinstance(operation.target, str):
                    given = passing.calls.get(operation.target, (operation.arguments, operation.leaves))
                    args, kwargs = self._filled(operation, *given, env, rows)
                    output = self.model.get_submodule(operation.target)(*args, **kwargs)
                else:
                    args, kwargs = self._filled(operation, operation.arguments, operation.leaves, env, rows)
                    output = operation.target(*args, **kwargs)
                for value, tensor in zip(operation.outputs, trees.tensors(output), strict=False):
                    if value is not None:
                        env[value] = tensor
        return env

    def leave(self, kept: Tensor, dropped: Tensor | float) -> Tensor:
        """The branch output for all rows, from those of the undropped and of the dropped ones."""
        passing, where = self._leave(), self.program.axes[self.program.result]
        if isinstance(dropped, Tensor):
            return _join(kept, dropped, where, passing.split)
        filled = _all_rows(kept, where, passing.split).fill_(dropped)
        return filled if passing.unused else filled.index_copy_(where.axis, _entries(where, passing.split.kept), kept)

    def _leave(self) -> _Passing:
        assert self.passing is not None
        passing, self.passing = self.passing, None
        for buffer, before in passing.statistics:
            buffer.data.copy_(before)  # `data`: an earlier micro-batch's backward must not take it for a change
        return passing

    @contextlib.contextmanager
    def _in_replay(self) -> Iterator[None]:
        """Let hooks do nothing, and batch normalisation forget the few rows that it sees."""
        norms = self._tracking_norms() if self.program.batch_norm else []
        self.replaying = True
        try:
            for norm in norms:
                norm.track_running_stats = False
            yield
        finally:
            self.replaying = False
            for norm in norms:
                norm.track_running_stats = True

    def _tracking_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """The branch's batch normalisations with running statistics."""
        called = [
            self.model.get_submodule(operation.target)
            for operation in self.program.operations
            if isinstance(operation.target, str)
        ]
        norms = [m for c in called for m in c.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [norm for norm in norms if norm.track_running_stats]

    def _filled(
        self, operation: Operation, given: Arguments, leaves: Leaves, env: dict[int, Tensor], rows: Tensor
    ) -> Arguments:
        """The arguments `given` to an operation, with values from `env` and cut to `rows`."""

        def fill(recorded: Any, actual: Any) -> Any:
            if isinstance(recorded, Ref):
                return env[recorded.value]
            if isinstance(recorded, Outside) and recorded.rows is not None:
                return _take(actual, recorded.rows, rows)
            if isinstance(recorded, Rows):
                return recorded.each * len(rows)
            if isinstance(recorded, Named) and not isinstance(actual, Tensor):
                return _named_tensor(self.model, recorded.name)
            return actual

        new = iter([fill(operation.leaves[path], actual) for path, actual in leaves.items()])
        filled: Arguments = trees.map_leaves(lambda _: next(new), given)
        return filled

    def _reunited(self, name: str, given: Arguments, leaves: Leaves, passing: _Passing) -> Arguments:
        """The arguments of a module with all rows again, since it is called in another way than was recorded."""
        number, split = self._numbers[name], passing.split
        inner = _inner(self.program.operations[number], leaves)
        if not inner or inner.keys() != self.program.operations[number].taken.keys():
            self.passing = None
            raise ForwardError(
                f"`{name}` is called with other arguments than when the branch was found, and x is not among them. "
                "Attach with compute='dense', or with example_inputs like this batch"
            )
        # Any numbers do for dropped rows in DROP, where the gate replaces them; those of a real row do no harm.
        env = self.replay(number) if passing.freeze else None
        whole: dict[Path, Any] = {}
        for path, recorded in self.program.operations[number].leaves.items():
            if isinstance(recorded, Rows) and path in leaves:
                whole[path] = recorded.each * split.total
            elif isinstance(recorded, Ref):
                tensor, where = inner[recorded.value], self.program.axes[recorded.value]
                other = _take(tensor, where, torch.zeros_like(split.dropped)) if env is None else env[recorded.value]
                whole[path] = _join(tensor if env is None else tensor.detach(), other, where, split)
        new = iter([whole.get(path, leaf) for path, leaf in leaves.items()])
        arguments: Arguments = trees.map_leaves(lambda _: next(new), given)
        return arguments


def _inner(operation: Operation, leaves: Leaves) -> dict[int, Tensor]:
    """The values of the branch among the arguments given to an operation."""
    given = {value: leaves.get(path) for value, path in operation.taken.items()}
    return {value: tensor for value, tensor in given.items() if isinstance(tensor, Tensor)}


def _take(x: Tensor, where: RowAxis, rows: Tensor) -> Tensor:
    return x.index_select(where.axis, _entries(where, rows))


def _entries(where: RowAxis, rows: Tensor) -> Tensor:
    """The entries of an axis that belong to `rows`."""
    if where.fold == 1:
        return rows
    return (rows[:, None] * where.fold + torch.arange(where.fold, device=rows.device)).flatten()


def _all_rows(part: Tensor, where: RowAxis, split: Split) -> Tensor:
    """An uninitialised tensor like `part`, but of all rows."""
    shape = list(part.shape)
    shape[where.axis] = split.total * where.fold
    return part.new_empty(shape)


def _join(kept: Tensor, dropped: Tensor, where: RowAxis, split: Split) -> Tensor:
    """A tensor of all rows from those of the undropped and of the dropped ones."""
    out = _all_rows(kept, where, split).index_copy_(where.axis, _entries(where, split.kept), kept)
    return out.index_copy_(where.axis, _entries(where, split.dropped), dropped)


def _named_tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor
