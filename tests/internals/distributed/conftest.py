"""The fixtures of this folder."""

from internals.distributed.wire import wire, world

__all__ = ["wire", "world"]
