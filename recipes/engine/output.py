"""What a run prints never ends it: a terminal may be closed or ASCII, a pipe broken, the log's disk full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def best_effort_output() -> Iterator[None]:
    """Within the context, writing to stdout and stderr never fails: what cannot be written is lost.

    That holds for `print`, warnings, progress bars and whatever else writes to `sys.stdout` and `sys.stderr`. A thread
    that cannot write to a file prints no traceback.
    """
    for standard in range(3):  # a closed one's number would go to the next file that is opened, and printing into it
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before, hook = (sys.stdout, sys.stderr), threading.excepthook

    def told_by_the_main_thread(thread: threading.ExceptHookArgs) -> None:
        if not issubclass(thread.exc_type, OSError):  # TensorBoard's, which hands it on when it is next written to
            hook(thread)

    threading.excepthook = told_by_the_main_thread
    sys.stdout, sys.stderr = (cast(TextIO, _BestEffort(stream)) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _BestEffort):
                stream.finish()
        sys.stdout, sys.stderr = before
        threading.excepthook = hook


class _BestEffort:
    """A text stream that swallows the errors of another; all else is the other's."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: TextIO = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (for good)
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def finish(self) -> None:
        """Flush, and if that fails leave nothing that Python would stumble over when it exits."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
