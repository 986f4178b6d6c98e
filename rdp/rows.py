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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rdp.branches import RowAxis
from rdp.discovery.arguments import Arguments, Named, Outside, Ref, Rows, as_recorded, leaves, rebuild
from rdp.discovery.program import Program, Step
from rdp.discovery.trace import tensors_in
from rdp.errors import ForwardError


@dataclass
class Split:
    """The rows of one forward of one branch, as int64 `Tensor[rows]` each; together they are all rows."""

    kept: Tensor
    dropped: Tensor

    @property
    def total(self) -> int:
        """The number of rows of the batch."""
        return self.kept.numel() + self.dropped.numel()


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
    calls: dict[str, Arguments] = field(default_factory=dict)


class BranchOnRows:
    """A branch that runs on some of the rows; its hooks call `enter`, `later` and one of `leave_*`, in this order.

    Args:
        model: The model that the program is of.
        program: The branch.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model = model
        self.program = program
        self.replaying = False
        self._numbers = {step.target: i for i, step in enumerate(program.steps) if isinstance(step.target, str)}
        self._passing: _Passing | None = None

    @property
    def passing(self) -> bool:
        """Has the branch been entered with some of its rows, and not been left?"""
        return self._passing is not None

    def forget(self) -> None:
        """Drop what an interrupted forward has left behind."""
        self._passing = None

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], split: Split, freeze: bool) -> Arguments | None:
        """The arguments of the branch's first module, cut to the undropped rows; None if the branch must run dense."""
        program, step, given = self.program, self.program.steps[0], (args, kwargs)
        if not as_recorded(step.arguments, given, split.total, split.total):
            return None
        (x,) = _inner(step, given).values()
        where = program.axes[program.start]
        shape = list(program.shape)
        shape[where.axis] = entries = split.total * where.fold
        if list(x.shape) != shape and not (program.fits_any_shape and x.shape[where.axis] == entries):
            return None
        statistics = []
        if unused := not split.kept.numel():
            few = 2 if program.batch_norm else 1
            split = Split(split.dropped[:few], split.dropped[few:])
            statistics = [(b, b.clone()) for norm in self._tracking_norms() for b in norm.buffers(recurse=False)]
        self._passing = _Passing(split, freeze, x, unused, statistics, {program.entry: given})
        return self._filled(step, given, {program.start: _take(x, where, split.kept)}, split.kept)

    def later(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a later module: those from outside of the branch are cut to the undropped rows."""
        assert self._passing is not None
        passing, step, given = self._passing, self.program.steps[self._numbers[name]], (args, kwargs)
        if not as_recorded(step.arguments, given, passing.split.total, passing.split.kept.numel()):
            self._left()
            return self._reunited(name, given, passing)
        passing.calls[name] = given
        return self._filled(step, given, _inner(step, given), passing.split.kept)

    def leave_drop(self, z: Tensor) -> Tensor:
        """The branch output for all rows, zero for dropped ones, from that of the undropped rows."""
        passing, where = self._left(), self.program.axes[self.program.result]
        zeros = _all_rows(z, where, passing.split).zero_()
        return zeros if passing.unused else zeros.index_copy_(where.axis, _entries(where, passing.split.kept), z)

    def leave_freeze(self, z: Tensor) -> Tensor:
        """The branch output for all rows, from that of the undropped rows; only the dropped ones have a gradient."""
        passing = self._left()
        learning = self._replay(passing, len(self.program.steps))[self.program.result]
        return _join(z.detach(), learning, self.program.axes[self.program.result], passing.split)

    def _left(self) -> _Passing:
        assert self._passing is not None
        passing, self._passing = self._passing, None
        for buffer, before in passing.statistics:
            buffer.data.copy_(before)  # `data`: an earlier micro-batch's backward must not take it for a change
        return passing

    def _replay(self, passing: _Passing, steps: int) -> dict[int, Tensor]:
        """Run the first `steps` steps on the dropped rows; the values that they make."""
        rows = passing.split.dropped
        env = {self.program.start: _take(passing.x, self.program.axes[self.program.start], rows)}
        with self._in_replay(), self._without_running_statistics():
            for step in self.program.steps[:steps]:
                if isinstance(step.target, str):
                    args, kwargs = self._filled(step, passing.calls.get(step.target, step.arguments), env, rows)
                    output = self.model.get_submodule(step.target)(*args, **kwargs)
                else:
                    args, kwargs = self._filled(step, step.arguments, env, rows)
                    output = step.target(*args, **kwargs)
                for value, tensor in zip(step.outputs, tensors_in(output), strict=False):
                    if value is not None:
                        env[value] = tensor
        return env

    @contextlib.contextmanager
    def _in_replay(self) -> Iterator[None]:
        self.replaying = True
        try:
            yield
        finally:
            self.replaying = False

    @contextlib.contextmanager
    def _without_running_statistics(self) -> Iterator[None]:
        """Let batch normalisation forget the few rows that it sees."""
        norms = self._tracking_norms()
        try:
            for norm in norms:
                norm.track_running_stats = False
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True

    def _tracking_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """The branch's batch normalisations with running statistics."""
        if not self.program.batch_norm:
            return []
        called = [self.model.get_submodule(step.target) for step in self.program.steps if isinstance(step.target, str)]
        norms = [m for c in called for m in c.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [norm for norm in norms if norm.track_running_stats]

    def _filled(self, step: Step, given: Arguments, env: dict[int, Tensor], rows: Tensor) -> Arguments:
        """The arguments `given` to a step, with values from `env` and cut to `rows`."""

        def fill(recorded: Any, actual: Any) -> Any:
            if isinstance(recorded, Ref):
                return env[recorded.value]
            if isinstance(recorded, Outside) and recorded.rows is not None:
                return _take(actual, recorded.rows, rows)
            if isinstance(recorded, Rows):
                return recorded.each * rows.numel()
            if isinstance(recorded, Named) and not isinstance(actual, Tensor):
                return _named_tensor(self.model, recorded.name)
            return actual

        filled: Arguments = rebuild(step.arguments, given, fill)
        return filled

    def _reunited(self, name: str, given: Arguments, passing: _Passing) -> Arguments:
        """The arguments of a module with all rows again, since it is called in another way than was recorded."""
        number = self._numbers[name]
        step, split = self.program.steps[number], passing.split
        if _missing(step, given):
            raise ForwardError(
                f"`{name}` is called with other arguments than when the branch was found, and x is not among them. "
                "Attach with compute='dense', or with example_inputs like this batch"
            )
        # Any numbers do for dropped rows in DROP, where the gate replaces them; those of a real row do no harm.
        env = self._replay(passing, number) if passing.freeze else None

        def reunite(recorded: Any, actual: Any) -> Any:
            if not isinstance(recorded, Ref):
                return actual
            where = self.program.axes[recorded.value]
            if env is not None:
                return _join(actual.detach(), env[recorded.value], where, split)
            return _join(actual, _take(actual, where, torch.zeros_like(split.dropped)), where, split)

        reunited: Arguments = rebuild(step.arguments, given, reunite)
        return reunited


def _inner(step: Step, given: Arguments) -> dict[int, Tensor]:
    """The values of the branch among the arguments given to a step."""
    found: dict[int, Tensor] = {}

    def note(recorded: Any, actual: Any) -> Any:
        if isinstance(recorded, Ref):
            found[recorded.value] = actual
        return actual

    rebuild(step.arguments, given, note)
    return found


def _missing(step: Step, given: Arguments) -> bool:
    """Is a recorded value of the branch not among the arguments given to a step?"""
    found = {value for value, tensor in _inner(step, given).items() if isinstance(tensor, Tensor)}
    return any(isinstance(leaf, Ref) and leaf.value not in found for leaf in leaves(step.arguments))


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
