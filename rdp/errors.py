"""What can go wrong, as types: exceptions of the library derive from `RdpError`, its warnings are `RdpWarning`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence

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
    """A training forward cannot be gated: rows that are not found, an empty batch, `vmap`, a replica of the model."""


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


def formed(value: object) -> str:
    """What a value is, for a message: a short one itself, of a tensor the shape, of a container what is in it."""
    kind = type(value).__name__
    kind = f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple, Mapping)) and not value:
        return f"an empty {type(value).__name__}"
    if isinstance(value, (list, tuple)):
        return f"{kind} of {len(value)} ({listed([formed(item) for item in value], 2)})"
    if isinstance(value, Mapping):
        return f"{kind} ({listed([f'{key}: {formed(item)}' for key, item in value.items()], 4)})"
    text = repr(value) if isinstance(value, (bool, int, float, complex, str, bytes, type(None))) else kind
    return text if len(text) < 40 else kind
