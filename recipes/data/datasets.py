"""The data sets of the recipes, and readers of the small ones: their own files to arrays."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.folder import Split
from data.small_images import has_class_folders, read_small_images

MNIST10K = Path(__file__).with_name("mnist10k.npz")
LARGEST_RATIO = 1032  # of deflate: two bits for 258 bytes (zlib's technical details)
MNIST10K_TRAIN = 8500  # the other 1,500 are the test split; the file was shuffled once when it was made


@dataclass(frozen=True)
class DataSet:
    """What a recipe must know of a data set before it opens one."""

    name: str
    channels: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    classes: int | None = None  # None: as many as the data has


@dataclass(frozen=True)
class Arrays:
    """A split in memory: images `uint8[samples, C, H, W]` and labels `int64[samples]`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


_MNIST = DataSet("mnist", 1, 28, (0.1307,), (0.3081,), "none", 10)
DATASETS = {
    dataset.name: dataset
    for dataset in (
        replace(_MNIST, name="mnist10k"),
        _MNIST,
        DataSet("fashion-mnist", 1, 28, (0.2860,), (0.3530,), "none", 10),
        DataSet("cifar10", 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop-flip", 10),
        DataSet("imagenet", 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "resized-crop-flip"),
    )
}


def find_dataset(name: str) -> DataSet:
    """The data set of that name."""
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def read_arrays(name: str, split: Split, data_dir: str | Path | None = None, download: bool = False) -> Arrays:
    """Read a split of a small data set into memory.

    Args:
        name: "mnist10k", "mnist", "fashion-mnist" or "cifar10".
        split: "train" or "test".
        data_dir: where its files lie, as torchvision lays them out, or IDX files directly; of "cifar10" also class
            folders of images, `train/CLASS/*` and `test/CLASS/*`.
        download: let torchvision fetch them if they are not there.

    Raises:
        DataError: a file is missing, cut short or not what its name says.
    """
    if name == "mnist10k":
        return _read_mnist10k(split)
    if data_dir is None:
        raise DataError(f"{name} is read from files: say where they are with --data-dir (add --download to fetch them)")
    if name == "cifar10":
        if not download and has_class_folders(Path(data_dir)):
            spec = find_dataset(name)
            return Arrays(*read_small_images(Path(data_dir), split, name, spec.resolution, spec.classes))
        return _read_cifar10(split, Path(data_dir), download)
    return _read_digits(name, split, Path(data_dir), download)


def _read_mnist10k(split: Split) -> Arrays:
    with np.load(MNIST10K) as file:
        images, labels = file["images"][:, None], file["labels"].astype(np.int64)
    part = slice(MNIST10K_TRAIN) if split == "train" else slice(MNIST10K_TRAIN, None)
    return Arrays(images[part], labels[part])


def _read_cifar10(split: Split, data_dir: Path, download: bool) -> Arrays:
    from torchvision.datasets import CIFAR10

    try:
        cifar = CIFAR10(str(data_dir), train=split == "train", download=download)
    except (RuntimeError, OSError, EOFError) as error:
        raise DataError(
            f"CIFAR-10 cannot be read from {data_dir} ({_sentence(error)}); "
            "add --download to fetch it, or put cifar-10-batches-py there, or class folders train/CLASS/* and "
            "test/CLASS/* of its images; folders of other images are for recipes/imagenet_ffcv.py"
        ) from error
    return Arrays(np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2)), np.asarray(cifar.targets, np.int64))


def _read_digits(name: str, split: Split, data_dir: Path, download: bool) -> Arrays:
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    stem = {"train": "train", "test": "t10k"}[split]
    if download:
        from torchvision import datasets

        try:
            getattr(datasets, folder)(str(data_dir), download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name} cannot be downloaded into {data_dir} ({_sentence(error)})") from error
    places = (data_dir, data_dir / folder / "raw")
    images_path, labels_path = (_find(places, f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {_times(images.shape)} values and {labels_path} {_times(labels.shape)}; "
            "expected as many labels as images"
        )
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds images of {_times(images.shape[1:])} pixels; {name} has 28 x 28")
    if labels.max(initial=0) > 9 or len(np.unique(labels)) < 2:
        raise DataError(f"{labels_path} holds labels {np.unique(labels).tolist()}; {name} has 0 to 9")
    return Arrays(images[:, None], labels.astype(np.int64))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array of bytes from an IDX file, gzipped or not, and no more of it than its header promises.

    Source: the file format of the MNIST database (LeCun, Cortes and Burges 1998).
    """
    try:
        # As many bytes as deflate can make of the file: what promises more lies, and nothing is allocated for it.
        gzipped = path.suffix == ".gz"
        most = path.stat().st_size * (LARGEST_RATIO if gzipped else 1)
        with gzip.open(path) if gzipped else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08" or not 1 <= start[3] <= 3:
                raise DataError(f"{path} is not an IDX file of bytes; fetch it again")
            sides = file.read(4 * start[3])
            if len(sides) < 4 * start[3]:
                raise DataError(f"{path} ends within its header; fetch it again")
            shape = tuple(np.frombuffer(sides, ">u4").tolist())
            promised = math.prod(shape)  # of Python's integers, which do not overflow
            if not 0 < promised <= most:
                raise DataError(f"{path} has a header of {_times(shape)} values, which it cannot hold; fetch it again")
            values = file.read(promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({_sentence(error)}); fetch it again") from error
    if len(values) != promised:
        found = len(values) if len(values) < promised else f"more than {promised}"
        raise DataError(f"{path} holds {found} values where its header says {promised}; fetch it again")
    return np.frombuffer(values, np.uint8).reshape(shape).copy()


def _find(places: tuple[Path, ...], name: str) -> Path:
    for path in (place / file for place in places for file in (name, f"{name}.gz")):
        if path.is_file():
            return path
    raise DataError(f"{name}(.gz) is neither in {places[0]} nor in {places[1]}; add --download to fetch it")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _sentence(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
