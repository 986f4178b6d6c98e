"""What goes wrong in a run and its user can put right: one clear sentence on stderr, exit status 1, no traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from data import DataError

from engine.start import lacks_memory

# A full disk, a missing permission, a path that is something else or was removed: errors of the machine, not ours.
_OF_THE_MACHINE = {
    errno.ENOENT,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
}
LAUNCHED = "RDP_RECIPES_LAUNCHED"  # process number of `launch`, in what it started: it reports their errors, once


class RunError(RuntimeError):
    """A run cannot start or go on; the message is one sentence that says what was found and what to do."""


@contextmanager
def explained(less: str = "choose a smaller --batch-size or a larger --accumulate") -> Iterator[None]:
    """Turn the errors that a user can put right into one sentence and exit status 1.

    Everything else is a mistake of ours and keeps its traceback.

    Args:
        less: how a run takes less memory.
    """
    try:
        yield
    except _told() as error:
        _exit(error, str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if lacks_memory(error) or isinstance(error, _if_imported("torch", "OutOfMemoryError")):
            found = str(error).rpartition("DefaultCPUAllocator: ")[2].partition(".")[0] or "MemoryError"
            _exit(error, f"out of memory ({found}): {less}")
        if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
            raise
        _exit(error, f"cannot use {os.fsdecode(error.filename or 'a file')}: {error.strerror}")
    except KeyboardInterrupt as error:  # before training or after it; in between a signal saves first
        _exit(error, "interrupted; what was saved is untouched", status=128 + signal.SIGINT)


def _told() -> tuple[type[Exception], ...]:
    return (RunError, DataError, *_if_imported("rdp", "RdpError"))


def _if_imported(module: str, error: str) -> tuple[type[Exception], ...]:
    # Who has not imported torch gets none of its errors, and is not to wait for it.
    kind = getattr(sys.modules.get(module), error, None)
    return () if kind is None else (kind,)


def _exit(error: BaseException, sentence: str, status: int = 1) -> NoReturn:
    if LAUNCHED in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(RunError(sentence))
    else:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status) from error
