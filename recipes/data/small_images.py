"""Class folders of images so small that all of them are held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.folder import Split, read_folder, read_image


def has_class_folders(data_dir: Path) -> bool:
    """Whether a folder holds class folders, and not torchvision's files."""
    return (data_dir / "train").is_dir() and not (data_dir / "cifar-10-batches-py").exists()


def read_small_images(
    data_dir: Path, split: Split, name: str, resolution: int, classes: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all images of `data_dir/SPLIT/CLASS/*`.

    Args:
        data_dir: holds the folders train/ and test/ (or val/).
        split: "train" or "test".
        name: of the data set, for errors.
        resolution: height and width that every image must have.
        classes: how many class folders there must be, if that is known.

    Returns:
        Images, `uint8[samples, 3, resolution, resolution]`, and labels, `int64[samples]`.

    Raises:
        DataError: as `read_folder` and `read_image`, or for other sizes or numbers of classes.
    """
    folder = read_folder(data_dir, split)
    if classes is not None and len(folder.classes) != classes:
        raise DataError(
            f"{data_dir} has {len(folder.classes)} class folders and {name} {classes}: folders of other images are for "
            "recipes/imagenet_ffcv.py"
        )
    images = np.empty((len(folder), 3, resolution, resolution), np.uint8)
    for place, path in zip(images, folder.paths, strict=True):
        image, _ = read_image(path)
        if image.size != (resolution, resolution):
            raise DataError(
                f"{path} has {image.width} x {image.height} pixels and {name} {resolution} x {resolution}: folders of "
                "other images are for recipes/imagenet_ffcv.py --resolution"
            )
        place[:] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return images, folder.labels.astype(np.int64)
