"""What can go wrong, as types: every exception of the library derives from `RdpError`."""


class RdpError(Exception):
    """Base of every exception that the library raises on purpose."""


class ArgumentError(RdpError, ValueError):
    """An argument has a value that cannot be used; the message names it and says what was found."""


class AttachError(RdpError, RuntimeError):
    """The model cannot be attached to (attached already, scripted, in DataParallel), or is not attached any more."""


class NativeDropPathError(AttachError):
    """The model already drops paths by itself; both mechanisms together would compound."""


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
