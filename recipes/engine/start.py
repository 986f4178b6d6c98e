"""The seconds that importing takes: Ctrl-C ends them at once, as SIGTERM does anyway, and without a traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT end the process within the context, where nothing has begun that would have to be ended in order."""
    try:
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler:  # not where somebody ignores or handles it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # only the main thread may
        handler = None
    try:
        yield
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
