"""What the Python frames of a running call tell that nothing else does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch


def callers() -> Iterator[FrameType]:
    """The frames that led to the caller of this function, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame := frame.f_back) is not None:
        yield frame


def is_autograd_function(frame: FrameType) -> bool:
    """Is it the forward of a `torch.autograd.Function`, which runs without gradients and makes them in its backward?

    That of a checkpoint with use_reentrant=True is one, and so are those of others who write checkpoints.
    """
    code = frame.f_code
    if code.co_name != "forward" or not code.co_argcount:
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), torch._C._FunctionBase)
