"""Forwards without some of the branches, as long as a context is open: hooks that are in the model for just so long."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.branches import Branch, GatePoint
from rdp.copies import Hook
from rdp.errors import ArgumentError, BranchError, listed, shortened, warn
from rdp.phases import Phase
from rdp.training import gates

if TYPE_CHECKING:
    from rdp.training.run import Run

Which = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""Branches: the name of one, names, or a function of (name, module)."""


def chosen(run: Run, which: Which) -> tuple[Branch, ...]:
    """Those branches of a run that are meant, in forward order.

    Raises:
        ArgumentError: If it is neither names nor a function, or the branches are not known yet.
        BranchError: If a name is that of no branch, or the function chooses none.
    """
    if not run.branches:
        raise ArgumentError(
            "the branches of this model are not known yet: run one training forward, or call handle.discover(inputs)"
        )
    names = [branch.name for branch in run.branches]
    if callable(which):
        wanted = [name for name in names if which(name, run.model.get_submodule(name))]
        if not wanted:
            raise BranchError(f"the function chose none of the branches {listed(names)}")
    else:
        wanted = [which] if isinstance(which, str) else list(which) if isinstance(which, Iterable) else [which]
    for name in wanted:
        if not isinstance(name, str):
            raise ArgumentError(
                f"branches are given by name, or by a function of (name, module); got {shortened(name)}"
            )
        if name not in names:
            raise BranchError(f"{name!r} is no branch of this model{_hint(name, names)}: {listed(names)}")
    return tuple(branch for branch in run.branches if branch.name in wanted)


@contextmanager
def without(run: Run, which: Which) -> Iterator[None]:
    """Forwards in this context have zero in the place of what these branches return.

    Raises:
        ArgumentError, BranchError: As `chosen`.
    """
    if not run.pauses:
        run.look()  # in a context within another there are hooks that are not for long
    branches, module = chosen(run, which), run.model.get_submodule
    with ExitStack() as stack:
        # Compiled code runs as it was written, lest it is compiled once for each set of branches.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Fused kernels of torch's own transformer layers would pass by the modules that end a branch.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        called = _Reached(run)
        stack.callback(run.model.register_forward_pre_hook(called).remove)
        hooks = {branch.name: [_Lesion(run, point) for point in branch.gates] for branch in branches}
        for lesion in [lesion for each in hooks.values() for lesion in each]:
            place = module(lesion.point.module)
            stack.callback(place.register_forward_hook(lesion).remove)
            if lesion.point.of_block:
                entry = place.register_forward_pre_hook(lesion.entry, with_kwargs=True)
                stack.callback(entry.remove)
        yield
        missed = [f"`{name}`" for name, each in hooks.items() if not all(lesion.reached for lesion in each)]
        if called.reached and missed:
            warn(f"no forward inside of handle.without(...) has come to {listed(missed)}: nothing was taken away there")


class _Reached(Hook):
    """A hook that remembers whether it was called."""

    reached = False

    def __call__(self, *_: Any) -> None:
        self.reached = True


class _Entry(Hook):
    """Forward pre-hook of a whole block: keeps its input, which the block may write to."""

    source: Tensor | None = None
    """What is left of a block without its branch; None where the module is none."""

    def __call__(self, module: nn.Module, *given: Any) -> None:
        self.source = next(trees.tensors(given)).clone()


class _Lesion(Hook):
    """Forward hook of a module that ends a branch."""

    reached = False

    def __init__(self, run: Run, point: GatePoint) -> None:
        super().__init__(run)
        self.point = point
        self.entry = _Entry(run)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.reached = True
        x = trees.tensor_at(output, self.point.leaf)
        return trees.with_tensor(output, self.point.leaf, gates.gate(Phase.DROP, False, x, self.entry.source))


def _hint(name: str, names: Sequence[str]) -> str:
    # A module of the branch, such as the attention before its drop path, is what one thinks of first.
    beside = [other for other in names if other.startswith(f"{name}.") or name.startswith(f"{other}.")]
    close = beside or difflib.get_close_matches(name, names, n=3)
    return f", did you mean {' or '.join(map(repr, close[:3]))}? The branches are" if close else ". The branches are"
