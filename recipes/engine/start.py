"""The seconds that importing takes: Ctrl-C ends them at once, as SIGTERM does anyway, and too little memory is said."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The system's loader of libraries, the system, torch's allocator, Python's threads: their errors have no common type.
_OUT_OF_MEMORY = ("failed to map segment", "annot allocate memory", "DefaultCPUAllocator", "can't start new thread")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the machine, or a limit as of `ulimit -v`, gives no more memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (ImportError, OSError, RuntimeError)) and any(
        word in str(error) for word in _OUT_OF_MEMORY
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT end the process within the context, where nothing has begun that would have to be ended in order.

    Raises:
        SystemExit: with status 1 and one sentence if memory is too little to import what is needed.
    """
    try:
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler:  # not where somebody ignores or handles it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # only the main thread may
        handler = None
    try:
        yield
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        found = (str(error) or "MemoryError").splitlines()[0]
        print(
            f"error: out of memory at the start ({found}): give the process more than 4 GB (ulimit -v)", file=sys.stderr
        )
        raise SystemExit(1) from error
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
