"""Running a branch only on the rows that a step needs.

In DROP the branch's first module gets the undropped rows alone, and the gate at its end puts zeros in the others'
places. In FREEZE the model's own call runs the undropped rows, whose gradient is stopped anyway; the dropped rows,
the only ones that learn, are run by replaying the branch as a program.

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
from rdp.discovery.program import Named, Outside, Program, Rows, Step
from rdp.discovery.trace import Ref, tensors_in

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Split:
    """The rows of one forward of one branch, as int64 `Tensor[rows]` each; together they are all rows."""

    kept: Tensor
    dropped: Tensor


@dataclass
class _Passing:
    """What is remembered between a branch's first module and its gate."""

    split: Split
    x: Tensor
    outside: dict[str, CallArguments] = field(default_factory=dict)


class BranchOnRows:
    """A branch that runs on some of the rows; its hooks call `enter`, `sideways` and `leave` in this order.

    Args:
        model: The model that the program is of.
        program: The branch.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model = model
        self.program = program
        self.replaying = False
        self.steps = {step.target: step for step in program.steps if isinstance(step.target, str)}
        self._passing: _Passing | None = None

    @property
    def passing(self) -> bool:
        """Has the branch been entered with some of its rows, and not been left?"""
        return self._passing is not None

    def forget(self) -> None:
        """Drop what an interrupted forward has left behind."""
        self._passing = None

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], split: Split) -> CallArguments:
        """The arguments of the branch's first module, cut to the undropped rows."""
        step = self.program.steps[0]
        x = next(t for leaf, t in _pairs(step, args, kwargs) if leaf == Ref(self.program.fork))
        self._passing = _Passing(split, x)
        return self.sideways(self.program.entry, args, kwargs)

    def sideways(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
        """The arguments of a module inside the branch: those from outside are cut to the undropped rows."""
        assert self._passing is not None
        self._passing.outside[name] = args, kwargs
        kept = self._passing.split.kept
        env = {self.program.fork: _take(self._passing.x, self.program.fork_rows, kept)}
        return self._call_arguments(self.steps[name], (args, kwargs), env, kept, keep_inner=True)

    def leave_drop(self, z: Tensor) -> Tensor:
        """The branch output for all rows, zero for dropped ones, from that of the undropped rows."""
        passing = self._left()
        return self._empty(z, passing).zero_().index_copy_(self.program.result_rows.axis, passing.split.kept, z)

    def leave_freeze(self, z: Tensor) -> Tensor:
        """The branch output for all rows, from that of the undropped rows; only the dropped ones have a gradient."""
        passing = self._left()
        axis = self.program.result_rows.axis
        learning = self.replay(passing)
        out = self._empty(z, passing).index_copy_(axis, passing.split.kept, z.detach())
        return out.index_copy_(axis, passing.split.dropped, learning)

    def replay(self, passing: _Passing) -> Tensor:
        """Run the program on the dropped rows."""
        rows = passing.split.dropped
        env = {self.program.fork: _take(passing.x, self.program.fork_rows, rows)}
        with self._replaying():
            for step in self.program.steps:
                name = step.target if isinstance(step.target, str) else None
                actual = passing.outside.get(name) if name is not None else None
                args, kwargs = self._call_arguments(step, actual, env, rows)
                target = self.model.get_submodule(name) if name is not None else step.target
                output = target(*args, **kwargs)  # type: ignore[operator]
                for value, tensor in zip(step.outputs, tensors_in(output), strict=False):
                    if value is not None:
                        env[value] = tensor
        return env[self.program.result]

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[None]:
        self.replaying = True
        try:
            yield
        finally:
            self.replaying = False

    def _left(self) -> _Passing:
        assert self._passing is not None
        passing, self._passing = self._passing, None
        return passing

    def _empty(self, z: Tensor, passing: _Passing) -> Tensor:
        shape = list(z.shape)
        shape[self.program.result_rows.axis] = passing.split.kept.numel() + passing.split.dropped.numel()
        return z.new_empty(shape)

    def _call_arguments(
        self,
        step: Step,
        actual: CallArguments | None,
        env: dict[int, Tensor],
        rows: Tensor,
        keep_inner: bool = False,
    ) -> CallArguments:
        """Fill in the recorded arguments of a step.

        Args:
            step: The step.
            actual: The arguments of the model's own call, where the step takes tensors from outside of the branch.
            env: The program's values so far.
            rows: The rows to run.
            keep_inner: Leave values that `env` lacks as the model's own call has them.
        """
        outside = iter(tensors_in(actual)) if actual is not None else iter(())

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, (Ref, Outside, Named)):
                given = next(outside, None)
                if isinstance(leaf, Named):
                    return given if given is not None else _named_tensor(self.model, leaf.name)
                if isinstance(leaf, Outside):
                    assert given is not None
                    return given if leaf.rows is None else _take(given, leaf.rows, rows)
                return given if keep_inner and leaf.value not in env else env[leaf.value]
            if isinstance(leaf, Rows):
                return leaf.each * rows.numel()
            if isinstance(leaf, dict):
                return {key: fill(value) for key, value in leaf.items()}
            if isinstance(leaf, (list, tuple)):
                items = [fill(value) for value in leaf]
                return items if isinstance(leaf, list) else tuple(items)
            if isinstance(leaf, slice):
                return slice(fill(leaf.start), fill(leaf.stop), fill(leaf.step))
            return leaf

        args, kwargs = step.arguments
        return fill(args), fill(kwargs)


def _pairs(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Recorded tensor arguments of a step, beside the tensors that it is called with."""

    def placeholders(value: Any) -> Iterator[Any]:
        if isinstance(value, (Ref, Outside, Named)):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from placeholders(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from placeholders(item)

    return zip(placeholders(step.arguments), tensors_in((args, kwargs)), strict=True)


def _take(x: Tensor, where: RowAxis, rows: Tensor) -> Tensor:
    if where.fold > 1:
        offsets = torch.arange(where.fold, device=rows.device)
        rows = (rows[:, None] * where.fold + offsets).flatten()
    return x.index_select(where.axis, rows)


def _named_tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor
