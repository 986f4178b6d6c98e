"""What all hooks of ours have in common: they ask the run, in Python in one way and in a graph in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rdp import frames
from rdp.copies import Hook
from rdp.training.recomputation import in_reentrant_checkpoint
from rdp.training.step import Forward

if TYPE_CHECKING:
    from rdp.training.run import Run


class RunHook(Hook):
    """A hook that asks the run what to do, in one way in Python and in another in the graph of a compiler.

    Args:
        run: That of the model.
        eager: Called with what torch gives a hook.
        traced: The same for a compiler to look into; None does nothing.
    """

    def __init__(self, run: Run, eager: Callable[..., Any], traced: Callable[..., Any] | None = None) -> None:
        super().__init__(run)
        self.run = run
        self.eager = eager
        self.traced = traced

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """What torch calls."""
        if torch.compiler.is_compiling():
            return self.traced(module, *given) if self.traced is not None else None
        return self.eager(module, *given)


def is_plain(forward: Forward, branch: int) -> bool:
    """Is the block of this branch in eval mode, or does it run without gradients, and not for a checkpoint?"""
    if branch in forward.plain:
        return True
    return not torch.is_grad_enabled() and not any(map(frames.is_autograd_function, frames.callers()))


def current_forward(run: Run) -> Forward | None:
    """The forward that a gate called now belongs to; None if it is not gated, or not in a forward at all."""
    if run.calls.running:
        # One that is not over in eval mode was interrupted.
        return run.calls.running[-1] if run.model.training else None
    if run.compiled is not None and run.compiled.ticket is not None and run.step.forwards:
        return run.step.forwards[-1]  # the model is compiled, and torch has given up on the part that asks
    return run.calls.of_backward(run.step)


def trains_unseen(run: Run) -> bool:
    """Is a branch that is not gated now trained all the same, by somebody who calls parts of the model?"""
    unseen = not run.calls.running and not run.pauses and torch._C._current_graph_task_id() == -1
    return unseen and run.model.training and torch.is_grad_enabled()


def may_leave_no_graph(run: Run) -> bool:
    """May a branch whose rows are all alike be left out of the graph?"""
    # A checkpoint that is recomputed for its graph may hold nothing but this branch. And with a mask for each row,
    # another process may need what this one does not: sharded gradients are reduced by all or by none.
    return (run.options.mode == "batch" or not run.several) and not in_reentrant_checkpoint()
