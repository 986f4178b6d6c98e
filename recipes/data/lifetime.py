"""A process that must not outlive the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def die_with(parent: int) -> None:
    """End this process, at once and whatever it does, when the one that started it ends, be it by `kill -9`.

    On Linux the system does it; elsewhere only a parent that is gone already is noticed. The parent must have started
    this process from its main thread: the system watches the thread, not the process.

    Args:
        parent: process number of the one that started this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the system was asked
        os._exit(1)
