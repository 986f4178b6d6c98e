"""Write a file so that a reader sees the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from data.disk import sync_folder


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file by way of a temporary one beside it, flushed to the disk before it takes the name.

    Args:
        path: the file; its folder must exist.
        content: all of its bytes.

    Raises:
        OSError: the bytes cannot be written (such as on a full disk); `path` is as before and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.filename = str(path)  # the user knows this file, not the temporary one
        raise
    sync_folder(path.parent)
