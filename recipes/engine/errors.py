"""What goes wrong in a run and its user can put right: one clear sentence on stderr, exit status 1, no traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data import DataError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import rdp

LAUNCHED = "RDP_RECIPES_LAUNCHED"  # set for the processes that `launch` started: it reports their errors, once


class RunError(RuntimeError):
    """A run cannot start or go on; the message is one sentence that says what was found and what to do."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that a user can put right into one sentence and exit status 1.

    Everything else is a mistake of ours and keeps its traceback.
    """
    try:
        yield
    except (RunError, DataError, rdp.RdpError) as error:
        _exit(error, str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _exit(error, f"cannot write {error.filename or 'a file'}: {error.strerror}")


def _exit(error: BaseException, sentence: str) -> None:
    if LAUNCHED in os.environ:
        get_error_handler().record_exception(RunError(sentence))
    else:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(1) from error
