"""The forward hooks that `attach` injects. They read the state of the handle and decide nothing.

Hooks live in the model, so they are copied and pickled with it. A copy must be a plain, working model that does not
drive the original's handle: hooks therefore turn into a function that does nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rdp import gates
from rdp.branches import GatePoint
from rdp.discovery.trace import tensors_in
from rdp.errors import RdpWarning
from rdp.forward import Forward, in_backward, in_reentrant_checkpoint
from rdp.phases import Phase
from rdp.rows import BranchOnRows

if TYPE_CHECKING:
    from rdp.handle import ResidualDropPath


def inert(*args: Any) -> None:
    """What a hook is in a copy of the model."""


def _inert() -> Callable[..., None]:
    return inert


class Hook:
    """A hook that does not outlive a copy of its model."""

    def __init__(self, handle: ResidualDropPath) -> None:
        self.handle = handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert, ()


class BeginHook(Hook):
    """Forward pre-hook of the model: masks are decided here, once, for all branches."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Start a forward."""
        self.handle._begin_forward(module, args, kwargs)


class EndHook(Hook):
    """Forward hook of the model, called also when the forward raised."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """End a forward."""
        return self.handle._end_forward(output)


class EntryHook(Hook):
    """Forward pre-hook of the first module of a branch that runs on some of the rows.

    Args:
        handle: Owner of the state.
        branch: Index of the branch.
        on_rows: The branch.
    """

    def __init__(self, handle: ResidualDropPath, branch: int, on_rows: BranchOnRows) -> None:
        super().__init__(handle)
        self.branch = branch
        self.on_rows = on_rows

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Cut the arguments to undropped rows, if there are such and others."""
        if self.on_rows.replaying:
            return None
        self.on_rows.forget()
        forward = self.handle._forwards.current()
        if forward is None or forward.phase is Phase.PLAIN or torch.compiler.is_compiling():
            return None
        if not 0 < forward.kept(self.branch) < forward.rows:
            return None
        device = next(tensors_in((args, kwargs))).device
        split = forward.split(self.branch, device)
        return self.on_rows.enter(args, kwargs, split, freeze=forward.phase is Phase.FREEZE)


class LaterHook(Hook):
    """Forward pre-hook of a later module of such a branch.

    Args:
        handle: Owner of the state.
        name: Qualified name of the module.
        on_rows: The branch.
    """

    def __init__(self, handle: ResidualDropPath, name: str, on_rows: BranchOnRows) -> None:
        super().__init__(handle)
        self.name = name
        self.on_rows = on_rows

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Cut the arguments from outside to the rows that the branch was entered with."""
        if self.on_rows.replaying or not self.on_rows.passing:
            return None
        return self.on_rows.later(self.name, args, kwargs)


class GateHook(Hook):
    """Forward hook of a module that ends a branch.

    Args:
        handle: Owner of the state.
        branch: Index of the branch.
        point: Which output tensor is masked, and along which axis.
        keep_prob: With `scale_by_keep`, what undropped rows are divided by in DROP.
        on_rows: The branch, if it runs on some of the rows.
    """

    def __init__(
        self,
        handle: ResidualDropPath,
        branch: int,
        point: GatePoint,
        keep_prob: float | None,
        on_rows: BranchOnRows | None = None,
    ) -> None:
        super().__init__(handle)
        self.branch = branch
        self.point = point
        self.keep_prob = keep_prob
        self.on_rows = on_rows

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Mask the output; None leaves it as it is."""
        if self.on_rows is not None and self.on_rows.replaying:
            return None
        forward = self.handle._forwards.current()
        if forward is None:
            self._warn_if_stray(module)
            return None
        if forward.phase is Phase.PLAIN or (forward.phase is Phase.FREEZE and self.handle.options.freeze == "params"):
            return None
        x = output if isinstance(output, Tensor) else list(tensors_in(output))[self.point.leaf]
        source = next(tensors_in(args)) if self.point.of_block else None
        # A compiler wants one program for all masks; a recomputed checkpoint may be nothing but this branch.
        skip_work = not torch.compiler.is_compiling() and not in_reentrant_checkpoint()
        if self.on_rows is not None and self.on_rows.passing:
            gated = self._gate_some_rows(forward, x, self.on_rows)
        elif self.on_rows is not None and skip_work and forward.kept(self.branch) in (0, forward.rows):
            gated = self._gate_whole(x, source, forward.phase, keep=forward.kept(self.branch) > 0)
        elif forward.whole is not None and skip_work:
            gated = self._gate_whole(x, source, forward.phase, keep=forward.whole[self.branch])
        else:
            gated = self._gate_rows(forward, x, source)
        if gated is x:
            return None
        return gated if isinstance(output, Tensor) else gates.replace_leaf(output, self.point.leaf, gated)

    def _gate_rows(self, forward: Forward, x: Tensor, source: Tensor | None) -> Tensor:
        if self.point.rows is None:  # batch mode under torch.compile: one mask for all
            keep = forward.keep(self.branch, x.device)[0]
        else:
            keep = forward.keep(self.branch, x.device)
            keep = gates.broadcast_rows(keep, x, self.point.rows.axis, self.point.module)
        if forward.phase is Phase.DROP:
            return gates.drop_rows(x, keep, self.keep_prob) if source is None else gates.drop_block(x, source, keep)
        return gates.freeze_rows(x, keep) if source is None else gates.freeze_block(x, source, keep)

    def _gate_some_rows(self, forward: Forward, x: Tensor, on_rows: BranchOnRows) -> Tensor:
        if forward.phase is Phase.FREEZE:
            return on_rows.leave_freeze(x)
        return on_rows.leave_drop(x if self.keep_prob is None else gates.rescale(x, self.keep_prob))

    def _gate_whole(self, x: Tensor, source: Tensor | None, phase: Phase, keep: bool) -> Tensor:
        """Constants and detached outputs leave no graph behind, so nothing is computed backwards."""
        if keep and phase is Phase.FREEZE:
            return x.detach() if source is None else x.detach() + (source - source.detach())
        if keep:
            return x if self.keep_prob is None else gates.rescale(x, self.keep_prob)
        if phase is Phase.FREEZE:
            return x
        return torch.zeros_like(x) if source is None else source.clone()

    def _warn_if_stray(self, module: nn.Module) -> None:
        handle = self.handle
        if handle._forwards.running or handle._pauses or not (handle.model.training and torch.is_grad_enabled()):
            return
        if not in_backward() and not handle._warned_stray:
            handle._warned_stray = True
            warnings.warn(
                f"branch `{handle.branches[self.branch].name}` ran outside of a forward of the attached model, so it "
                f"is trained plainly. Call the {type(handle.model).__name__} itself, not its parts, or attach to the "
                "part that is called",
                RdpWarning,
                stacklevel=2,
            )
