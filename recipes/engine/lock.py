"""One run a folder: who trains in it holds a lock on it, which the system takes back when the process ends.

with claim(Path("results/.../seed-0")) as held:
    ...
    with held.writing():  # is it still our folder?
        ...
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from engine.errors import RunError

NAME = ".lock"
PATIENCE = 3.0  # seconds for the workers of a run that has just been killed to let go of what they inherited


@dataclass(frozen=True)
class Claim:
    """A folder that is ours."""

    folder: Path
    descriptor: int | None  # of the locked file; None where the file system has no locks

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write into the folder, if it is ours before; and if that fails, tell whether it still was.

        Raises:
            RunError: it was removed, or replaced by another one.
        """
        self.check()
        try:
            yield
        except (RunError, OSError):
            self.check()
            raise

    def check(self) -> None:
        """Look whether the folder is still there, and still ours.

        Raises:
            RunError: it was removed, or replaced by another one.
        """
        if not (self.folder.is_dir() if self.descriptor is None else _is(self.folder / NAME, self.descriptor)):
            raise RunError(
                f"{self.folder} was removed or replaced while the run went on, so nothing can be saved in it any more: "
                "start the run again"
            )


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Make a folder, and hold it until the context ends; if nothing was written into it, it is removed again.

    Raises:
        RunError: another process holds it, or it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    descriptor = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(folder)
        except OSError as error:
            raise RunError(
                f"cannot make the results folder {folder}: {error.strerror}; choose another --out"
            ) from error
        yield Claim(folder, descriptor)
    finally:
        if descriptor is not None:
            if _is(folder / NAME, descriptor):
                with contextlib.suppress(OSError):
                    (folder / NAME).unlink()
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty, or gone
            for place in made:
                place.rmdir()


def _lock(folder: Path) -> int | None:
    path = folder / NAME
    until = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                path.unlink()
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > until:
                raise RunError(
                    f"{folder} is in use by {_describe(holder)}: wait for it, or choose another --out"
                ) from error
            time.sleep(0.05)
            continue
        if _is(path, descriptor):
            break
        os.close(descriptor)  # whoever held it removed it as it ended: the next one makes a new file
    ours = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(ours) + "\n").encode(), 0)
    return descriptor


def _describe(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, TypeError, KeyError):  # it has just got the lock and not written yet
        return "another process"


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
