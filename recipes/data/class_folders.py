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
    found: list[tuple[str, str, str]] = []
    listed: set[str] = set()
    pending = [top]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in listed or (real in elsewhere and folder != top):
            continue
        listed.add(real)
        with os.scandir(folder) as unordered:
            entries = sorted(unordered, key=lambda entry: entry.name, reverse=True)
        for entry in entries:
            if entry.is_dir():
                pending.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS):
                if not entry.is_file():  # reading a named pipe would wait forever
                    raise DataError(f"{entry.path} is no file (a link to nothing, or a pipe); remove it")
                target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                found.append((folder, entry.name, target))
    first: dict[str, str] = {}
    for folder, name, target in sorted(found):  # by folder as text, as torchvision does
        first.setdefault(target, os.path.join(folder, name))
    return list(first.values())
