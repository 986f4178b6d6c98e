"""Running a branch only on the rows that a step needs.

In DROP the branch's first module gets the undropped rows alone, and the gate at its end puts zeros in the others'
places. Where no row is left, a single one is run (two for batch normalisation, whose running statistics do not keep
them), since a hook cannot keep the model from calling the branch. In FREEZE
the model's own call runs the dropped rows, the only ones that learn; the undropped ones, whose gradient is stopped
anyway, are run by replaying the branch as a program, without a graph. With batch normalisation it is the other way
round, since the model's own call is the one that updates running statistics.

Should the model call a module of the branch otherwise than when the branch was found (an attention mask where there
was none), the rows are put together again in front of that module, and the rest runs on all of them.

The idea is DINOv2's `drop_add_residual_stochastic_depth`, without touching the model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.discovery.records import Arguments, Ref
from rdp.errors import ForwardError
from rdp.rows.arguments import Leaves, Named, Outside, Rows, as_recorded
from rdp.rows.moving import put, take
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

    own: Tensor
    """The rows that the model's own call runs, int64 `Tensor[rows]`."""
    others: Tensor
    own_undropped: bool
    """Are those undropped, and the others dropped, or the other way round?"""
    freeze: bool
    x: Tensor
    unused: bool = False
    """Are the rows that run run for nothing?"""
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """If so, running statistics, each with a copy of what they were before."""
    calls: dict[str, tuple[Arguments, Leaves]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of rows of the batch."""
        return len(self.own) + len(self.others)


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
        # Not asked of the operations: torch 2.6 cannot compile reading a method, as `Tensor.permute`, off an object.
        self._functions = [None if isinstance(o.target, str) else o.target for o in program.operations]

    def enter(self, given: Arguments, split_on: Callable[[torch.device], Split], freeze: bool) -> Arguments | None:
        """The arguments of the branch's first module, cut to some rows; None if the branch must run dense.

        Args:
            given: Those that the model gives.
            split_on: Returns the rows, on a device.
            freeze: Will the other rows be run by `replay`?
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
        own_undropped = not freeze or program.batch_norm
        own, others = (split.kept, split.dropped) if own_undropped else (split.dropped, split.kept)
        statistics = []
        if unused := not len(split.kept):
            few = 2 if program.batch_norm else 1
            own, others = split.dropped[:few], split.dropped[few:]
            statistics = [
                (b, b.clone())
                for norm in _tracking_norms(self._modules().values())
                for b in norm.buffers(recurse=False)
            ]
        self.passing = _Passing(own, others, own_undropped, freeze, x, unused, statistics)
        self.passing.calls[str(operation.target)] = given, leaves
        return self._filled(operation, given, leaves, {program.start: take(x, where, own)}, own)

    def later(self, name: str, given: Arguments) -> Arguments:
        """The arguments of a later module: those from outside of the branch are cut to the same rows."""
        assert self.passing is not None
        passing, operation, leaves = self.passing, self.program.operations[self._numbers[name]], trees.leaves(given)
        if not as_recorded(operation.leaves, leaves, passing.total, len(passing.own)):
            reunited = self._reunited(name, given, leaves, passing)
            self._leave()
            return reunited
        passing.calls[name] = given, leaves
        return self._filled(operation, given, leaves, _inner(operation, leaves), passing.own)

    def replay(self, operations: int | None = None) -> dict[int, Tensor]:
        """Run the branch on the other rows, or the first `operations` operations of it; the values that they make."""
        assert self.passing is not None
        passing, rows = self.passing, self.passing.others
        # What learns has run before: autocast keeps the weights that it has cast first, with their graph or without.
        learn = passing.own_undropped and torch.is_grad_enabled()
        modules = self._modules()
        # Torch makes one graph with gradients of a compiled module, and one without: it is not asked for a second one.
        spared = not learn and torch.is_grad_enabled() and _any_is_compiled(modules.values())
        norms = _tracking_norms(modules.values()) if self.program.batch_norm else []
        self._in_replay(True, norms)
        try:  # a context manager of ours torch 2.6 could not trace
            with torch.set_grad_enabled(learn or spared):
                env = {self.program.start: take(passing.x, self.program.axes[self.program.start], rows)}
                for operation, function in zip(self.program.operations[:operations], self._functions, strict=False):
                    recorded = operation.arguments, operation.leaves
                    if function is None:
                        name = str(operation.target)
                        args, kwargs = self._filled(operation, *passing.calls.get(name, recorded), env, rows)
                        output = modules[name](*args, **kwargs)
                    else:
                        args, kwargs = self._filled(operation, *recorded, env, rows)
                        output = function(*args, **kwargs)
                    for value, tensor in zip(operation.outputs, trees.tensors(output), strict=False):
                        if value is not None:
                            env[value] = tensor
        finally:
            self._in_replay(False, norms)
        return {value: tensor.detach() for value, tensor in env.items()} if spared else env

    def leave(self, own: Tensor, others: Tensor | None) -> Tensor:
        """The branch output for all rows, from that of the model's own call and of `replay`; None: zeros."""
        passing, where = self._leave(), self.program.axes[self.program.result]
        if passing.unused:  # no row of it counts, and none has a graph
            shape = list(own.shape)
            shape[where.axis] = passing.total * where.fold
            return own.new_zeros(shape)
        return put(own, passing.own, others, passing.others, where)

    def _leave(self) -> _Passing:
        assert self.passing is not None
        passing, self.passing = self.passing, None
        for buffer, before in passing.statistics:
            buffer.data.copy_(before)  # `data`: an earlier micro-batch's backward must not take it for a change
        return passing

    def _in_replay(self, now: bool, norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> None:
        """Let hooks do nothing, and batch normalisation forget the few rows that it sees; or no more."""
        self.replaying = now
        for norm in norms:
            norm.track_running_stats = not now

    def _modules(self) -> dict[str, nn.Module]:
        """What the branch calls, by name."""
        return {name: self.model.get_submodule(name) for name in self._numbers}

    def _filled(
        self, operation: Operation, given: Arguments, leaves: Leaves, env: dict[int, Tensor], rows: Tensor
    ) -> Arguments:
        """The arguments `given` to an operation, with values from `env` and cut to `rows`."""
        new: dict[Path, Any] = {}
        for path, recorded in operation.leaves.items():
            if isinstance(recorded, Ref):
                new[path] = env[recorded.value]
            elif isinstance(recorded, Outside) and recorded.rows is not None:
                new[path] = take(leaves[path], recorded.rows, rows)
            elif isinstance(recorded, Rows):
                new[path] = recorded.each * len(rows)
            elif isinstance(recorded, Named) and not isinstance(leaves[path], Tensor):
                new[path] = _named_tensor(self.model, recorded.name)
        filled: Arguments = trees.with_leaves(given, new)
        return filled

    def _reunited(self, name: str, given: Arguments, leaves: Leaves, passing: _Passing) -> Arguments:
        """The arguments of a module with all rows again, since it is called in another way than was recorded."""
        number = self._numbers[name]
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
                whole[path] = recorded.each * passing.total
            elif isinstance(recorded, Ref):
                tensor, where = inner[recorded.value], self.program.axes[recorded.value]
                other = take(tensor, where, torch.zeros_like(passing.others)) if env is None else env[recorded.value]
                own = tensor.detach() if passing.freeze and passing.own_undropped else tensor
                whole[path] = put(own, passing.own, other, passing.others, where)
        arguments: Arguments = trees.with_leaves(given, whole)
        return arguments


def _any_is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Is one compiled, in place or as what `torch.compile` has returned?"""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modules)


def _tracking_norms(modules: Iterable[nn.Module]) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch normalisations in them with running statistics."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def _inner(operation: Operation, leaves: Leaves) -> dict[int, Tensor]:
    """The values of the branch among the arguments given to an operation."""
    given = {value: leaves.get(path) for value, path in operation.taken.items()}
    return {value: tensor for value, tensor in given.items() if isinstance(tensor, Tensor)}


def _named_tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor
