"""Masks for compiled models: one opaque operator that decides them at run time, in every call of the compiled graph.

A compiler sees a tensor come out of an operator and a phase that is a constant, so it makes one graph a phase. The
operator returns its tensor on the CPU: CUDA graphs, which would replay the masks of their recording for ever, leave
such an operator out.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rdp.discovery.trace import tensors_in
from rdp.errors import BranchError

if TYPE_CHECKING:
    from rdp.run import Run

_runs: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()


@torch.library.custom_op("rdp::begin_forward", mutates_args=())
def begin_forward(x: Tensor, run: int, branches: int) -> Tensor:
    """Begin a training forward of the model of `run`.

    Args:
        x: An input of the model, `Tensor[N, ...]`; only its length is used.
        run: Key of the run.
        branches: The number of its branches.

    Returns:
        Its masks, bool `Tensor[branches, N]` on the CPU.
    """
    _runs[run].watch.compiled = True
    masks = _runs[run].draw_masks(x.shape[0]).clone()
    return masks.pin_memory() if x.is_cuda else masks


@begin_forward.register_fake
def _(x: Tensor, run: int, branches: int) -> Tensor:
    return torch.empty((branches, x.shape[0]), dtype=torch.bool)


def begin(run: Run, args: Any, kwargs: Any) -> None:
    """Begin a forward as torch.compile sees it.

    Raises:
        BranchError: If the branches are not known yet.
    """
    run.traced_masks = None
    if run.pauses or not run.model.training or not torch.is_grad_enabled():
        return
    if not run.branches:
        raise BranchError(
            "the model is compiled before its branches are known; pass example_inputs to rdp.attach, or call "
            "handle.discover(inputs), so that they are found beforehand"
        )
    x = next(tensor for tensor in tensors_in((args, kwargs)) if tensor.dim())
    masks = begin_forward(x.detach(), run.key, len(run.branches))
    run.traced_masks = masks.to(x.device, non_blocking=True)


def register(run: Run) -> None:
    """Make a run known to the operator."""
    _runs[run.key] = run


def forget_compiled() -> None:
    """Drop compiled code: it was made without the hooks that have just been added, or with those just removed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that a compiler must not look into, even where it has given up on the caller."""
    return torch._dynamo.disable(function)(*args) if may_be_compiled() else function(*args)  # type: ignore[no-untyped-call]


def may_be_compiled() -> bool:
    """Can a part of a model be compiled in this process?"""
    return "torch._dynamo" in sys.modules
