"""Which image files the class folders of a folder hold: as torchvision's `ImageFolder` lists them, but never twice.

`ImageFolder` follows every link, so that one to its own folder makes 41 copies of each image, and two make 2^40.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def class_names(root: Path) -> list[str]:
    """The folders in a folder, sorted by name; class i is the i-th."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def list_images(root: Path, classes: list[str]) -> Iterator[list[str]]:
    """The image files of each class, at any depth, in torchvision's order.

    A real file comes once in a class, whatever links lead to it. A link is not followed to a folder that was listed
    already, to another class, or to a folder that holds them all: its images would be of several classes.

    Raises:
        DataError: two classes are the same folder, or a name of an image is no file.
        OSError: a folder cannot be listed.
    """
    real_root = Path(os.path.realpath(root))
    owners: dict[str, str] = {}
    for name in classes:
        owner = owners.setdefault(os.path.realpath(root / name), name)
        if owner != name:
            raise DataError(f"{root / owner} and {root / name} are one folder, and its images cannot be of two classes")
    elsewhere = {*owners, str(real_root), *map(str, real_root.parents)}
    for name in classes:
        yield _images(str(root / name), elsewhere)


def _images(top: str, elsewhere: set[str]) -> list[str]:
    """Image files under a folder, but for other folders whose real path is in `elsewhere`."""
    found: dict[str, list[tuple[str, str]]] = {}  # of each folder: path and real path of the files
    listed: set[str] = set()
    pending = [top]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in listed or (real in elsewhere and folder != top):
            continue
        listed.add(real)
        found[folder] = files = []
        with os.scandir(folder) as unordered:
            entries = sorted(unordered, key=lambda entry: entry.name)
        pending.extend(entry.path for entry in reversed(entries) if entry.is_dir())
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                if not entry.is_file():  # reading a named pipe would wait forever
                    raise DataError(f"{entry.path} is no file (a link to nothing, or a pipe); remove it")
                files.append(
                    (entry.path, os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}")
                )
    first: dict[str, str] = {}
    for folder in sorted(found):  # as text, as torchvision does
        for path, target in found[folder]:
            first.setdefault(target, path)
    return list(first.values())
