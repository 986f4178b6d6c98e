"""What can go wrong, as types: exceptions of the library derive from `RdpError`, its warnings are `RdpWarning`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from torch import Tensor


class RdpError(Exception):
    """Base of every exception that the library raises on purpose."""


class ArgumentError(RdpError, ValueError):
    """An argument has a value that cannot be used; the message names it and says what was found."""


class AttachError(RdpError, RuntimeError):
    """The model cannot be attached to (attached already, scripted, in DataParallel), or is not attached any more."""


class NativeDropPathError(AttachError):
    """The model already drops paths by itself; both mechanisms together would compound."""


class UnknownAttributeError(RdpError, AttributeError):
    """Something was assigned to the handle that it does not have."""


class BranchError(RdpError, RuntimeError):
    """No residual branch was found, or one that was asked for cannot be gated soundly."""


class ForwardError(RdpError, RuntimeError):
    """A training forward cannot be gated: an empty batch, `vmap`, or a replica of the model."""


class RankError(RdpError, RuntimeError):
    """Processes that train one model together are not in step, or it is unclear which of them share their rows."""


class StateError(RdpError, ValueError):
    """A state dict does not fit this handle: other branches, another mode or rate, or of more ranks."""


class RdpWarning(UserWarning):
    """Training goes on, but probably not as meant: an optimizer step that was not announced, a branch left out."""


def warn(message: str) -> None:
    """Warn with `RdpWarning` at the line of the user's that led here, past the library's own and torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rdp", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RdpWarning, stacklevel=level)


def shortened(value: object, limit: int = 120) -> str:
    """`repr(value)` for a message, cut where it is long; of a tensor its shape."""
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(items: Sequence[str], limit: int = 8) -> str:
    """Names for a message: the first of them, and how many more there are."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
