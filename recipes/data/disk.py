"""What makes a finished file stay."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk: a rename in it survives a power cut only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
