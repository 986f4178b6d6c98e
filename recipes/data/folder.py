"""A folder of class folders of images, as ImageNet comes: `ROOT/CLASS/*.jpeg`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.datasets import Split
from data.errors import DataError

_FOLDERS = {"train": ("train",), "test": ("val", "test")}


@dataclass(frozen=True)
class Folder:
    """The image files of a split and their labels, `int64[samples]`; class i is the i-th folder by name."""

    paths: list[Path]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def read_folder(data_dir: str | Path | None, split: Split) -> Folder:
    """List the images of a split of `data_dir/train/CLASS/*` or `data_dir/val/CLASS/*`.

    Raises:
        DataError: no such folder, fewer than two classes, a class without images, or other classes than in training.
    """
    from torchvision.datasets import ImageFolder

    if data_dir is None:
        raise DataError("imagenet is read from a folder: say where it is with --data-dir")
    root = _split_folder(Path(data_dir), split)
    try:
        images = ImageFolder(str(root))
    except OSError as error:
        raise DataError(f"{root} is not a folder of class folders of images ({str(error).splitlines()[0]})") from error
    if len(images.classes) < 2:
        raise DataError(
            f"{root} has {len(images.classes)} class ({images.classes[0]}); a classifier needs at least two"
        )
    if split == "test" and (Path(data_dir) / "train").is_dir():
        _check_same_classes(root, images.classes, Path(data_dir) / "train")
    return Folder([Path(path) for path, _ in images.samples], np.asarray(images.targets, np.int64), images.classes)


def read_image(path: Path) -> tuple[Image.Image, bytes]:
    """The image in a file, decoded in the colours that it is stored in, and the file's bytes.

    Raises:
        DataError: it cannot be read, or is not a whole image.
    """
    try:
        data = path.read_bytes()
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({error}); replace or remove it") from error
    return image, data


def _split_folder(data_dir: Path, split: Split) -> Path:
    places = [data_dir / name for name in _FOLDERS[split]]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(f"there is no folder {' or '.join(map(str, places))}; --data-dir must hold train/ and val/")


def _check_same_classes(root: Path, classes: list[str], train: Path) -> None:
    different = set(classes) ^ {path.name for path in train.iterdir() if path.is_dir()}
    if different:
        raise DataError(
            f"{root} and {train} have different class folders ({', '.join(sorted(different)[:3])}); "
            "their labels would not match"
        )
