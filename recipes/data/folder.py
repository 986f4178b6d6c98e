"""A folder of class folders of images, as ImageNet comes: `ROOT/CLASS/*.jpeg`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.class_folders import class_names, list_images
from data.errors import DataError

Split = Literal["train", "test"]
# Nothing else is tried, whatever a file is called: PIL would start Ghostscript on EPS, which is a programming language.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
_FOLDERS = {"train": ("train",), "test": ("val", "test")}
_RGB_CAN_BE_MADE_OF = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"))


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
    if data_dir is None:
        raise DataError("imagenet is read from a folder: say where it is with --data-dir")
    root = _split_folder(Path(data_dir), split)
    try:
        classes = class_names(root)
        files = list(list_images(root, classes))
        if split == "test" and (Path(data_dir) / "train").is_dir():
            _check_same_classes(root, classes, Path(data_dir) / "train")
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({error})") from error
    empty = [name for name, images in zip(classes, files, strict=True) if not images]
    if empty or not classes:
        what = f"no image in {', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}" if empty else "no folder in it"
        raise DataError(f"{root} is not a folder of class folders of images ({what})")
    if len(classes) < 2:
        raise DataError(f"{root} has 1 class ({classes[0]}); a classifier needs at least two")
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in files])
    return Folder([Path(path) for images in files for path in images], labels, classes)


def read_image(path: Path) -> tuple[Image.Image, bytes]:
    """The image in a file, decoded in the colours that it is stored in, and the file's bytes.

    As with torchvision and FFCV, an EXIF orientation turns nothing and of several frames the first counts. Of 16 bits a
    value the upper 8 are kept, which PIL does for colours and not for gray.

    Raises:
        DataError: it cannot be read, is not a whole image, is too large for the memory that there is, or has pixels of
            which it is not known how to show them.
    """
    try:
        data = path.read_bytes()
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except MemoryError as error:  # the file may be sound
        raise DataError(
            f"{path} cannot be decoded for lack of memory: give fewer --workers and the process more of it, or, if the "
            "image is not as large, replace it"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} cannot be decoded (it is none of {', '.join(FORMATS)}); replace or remove it"
        ) from error
    except Exception as error:  # of a damaged file PIL raises anything, such as OverflowError
        raise DataError(f"{path} cannot be decoded ({error}); replace or remove it") from error
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _RGB_CAN_BE_MADE_OF:
        raise DataError(
            f"{path} has pixels of PIL's mode {image.mode}, of which it is not known what is black and what is white; "
            "convert it to gray or RGB of 8 or 16 bits, or remove it"
        )
    return image, data


def _split_folder(data_dir: Path, split: Split) -> Path:
    places = [data_dir / name for name in _FOLDERS[split]]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(f"there is no folder {' or '.join(map(str, places))}; --data-dir must hold train/ and val/")


def _check_same_classes(root: Path, classes: list[str], train: Path) -> None:
    different = set(classes) ^ set(class_names(train))
    if different:
        raise DataError(
            f"{root} and {train} have different class folders ({', '.join(sorted(different)[:3])}); "
            "their labels would not match"
        )
