"""What a recipe reads its batches from: the `Loader` interface, and `make_loader` that chooses one.

    loader = make_loader("mnist", "train", train=True, batch_size=128, device="cpu", data_dir="data")
    for images, labels in loader.epoch(0):
        ...

Three loaders keep the interface: `ffcv_loader` (a `.beton` file), `memory_loader` (images small enough to hold) and
`folder_loader` (a folder of image files). Order and augmentation are a pure function of (seed, epoch, sample), so
the same numbers come from any loader, from any number of workers, and again after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, get_args

import torch
from torch import Tensor

from data import Augment, LoaderChoice
from data.beton import Beton, open_beton
from data.cpus import cpus_of_a_process
from data.datasets import DataSet, find_dataset, read_arrays
from data.errors import DataError
from data.ffcv_loader import FFCVLoader, ffcv_is_installed
from data.folder import Split, read_folder
from data.folder_loader import FolderLoader
from data.memory_loader import MemoryLoader
from data.sampling import Sampler, subset
from data.transforms import Crop, Pixels


class Loader(Protocol):
    """Batches of one split on one rank, epoch by epoch."""

    kind: str  # "ffcv", "memory" or "folder": what `auto` chose
    samples: int  # in the whole split, all ranks together
    classes: int
    channels: int
    listing: str  # digest of what is read: the names and classes of files, or the images, or the labels of a .beton

    def __len__(self) -> int:
        """Batches an epoch; the same number on every rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches `start, start + 1, ...` of an epoch.

        Args:
            epoch: which epoch; it decides the order and the augmentation.
            start: the first batch to yield, so that a resumed run goes on where it stopped.

        Yields:
            images, a normalized contiguous float32 `Tensor[N, C, H, W]`, and labels, an int64 `Tensor[N]`, on the
            loader's device. Both belong to the caller: no later batch overwrites them.

        Raises:
            DataError: an image cannot be read.
        """
        ...

    def close(self) -> None:
        """End worker threads and processes, whatever they do; the loader yields no more batches. Idempotent."""
        ...


def make_loader(
    dataset: str,
    split: Split,
    *,
    train: bool,
    batch_size: int,
    device: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    loader: LoaderChoice = "auto",
    augment: Augment = "auto",
    resolution: int | Callable[[int], int] | None = None,
    limit: int | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    workers: int | None = None,
) -> Loader:
    """Open one split of a data set with the fastest loader that can read it.

    Args:
        dataset: "mnist10k" (10,000 digits that come with these recipes), "mnist", "fashion-mnist", "cifar10" or
            "imagenet" (any folder of class folders: `data_dir/train/CLASS/*` and `data_dir/val/CLASS/*`).
        split: "train" or "test"; ImageNet's validation images are its "test".
        train: shuffle and augment. Every sample comes once an epoch but for fewer than `world_size` left over (and
            the partial last batch, with `drop_last`). Otherwise the samples come in the file's order, every one
            exactly once over all ranks, in batches of which none is larger than `batch_size`.
        batch_size: samples in a batch on this rank.
        device: where batches are put, such as "cpu" or "cuda:0".
        data_dir: where the data set lies; not needed for "mnist10k".
        download: let torchvision fetch "mnist", "fashion-mnist" or "cifar10" into `data_dir` if it is not there.
        loader: "ffcv" reads `data_dir/DATASET-SPLIT.beton` (see `tools/write_beton.py`), "torch" the data set's own
            files, "auto" the first where FFCV is installed and that file exists, else the second.
        augment: "crop-flip" (pad 4, crop at random, flip half: the standard of CIFAR), "resized-crop-flip" (the
            standard of ImageNet), "none"; "auto" is the data set's own: none for MNIST and Fashion-MNIST.
        resolution: height and width of the images in pixels, or a function from the epoch to it (progressive
            resizing); "imagenet" only, default 224.
        limit: use a fixed random subset of this many samples, the same for every seed; for short experiments.
        drop_last: leave out the partial last batch of a training epoch.
        rank: this process among `world_size`; rank r of a batch of all ranks gets its r-th slice.
        world_size: processes that share every epoch.
        seed: of order and augmentation.
        workers: threads (FFCV) or processes (torch, "imagenet"); default the CPUs that this process may use, shared
            among `world_size`.

    Returns:
        A loader; `close` it, or use `contextlib.closing`.

    Raises:
        DataError: the data is missing, corrupt, has too few classes, or does not go together with `limit` or `augment`;
            or FFCV is asked for and not installed.
        ValueError: another argument makes no sense.
    """
    for name, value, choices in (
        ("split", split, Split),
        ("loader", loader, LoaderChoice),
        ("augment", augment, Augment),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")
    spec = find_dataset(dataset)
    photographs = dataset == "imagenet"
    if resolution is not None and not photographs:
        raise ValueError(f"{dataset} comes in {spec.resolution} pixels; resolution is for imagenet only")
    beton_path = Path(data_dir or ".") / f"{dataset}-{split}.beton"
    use_ffcv = loader == "ffcv" or (loader == "auto" and beton_path.is_file() and ffcv_is_installed())
    workers = workers if workers is not None else cpus_of_a_process(world_size)

    def sampler(samples: int) -> Sampler:
        indices = subset(samples, limit, "--limit" if train else "--limit-test")
        return Sampler(indices, batch_size, train, drop_last, rank, world_size, seed)

    chosen = _choose_augment(augment, spec, photographs) if train else "none"
    pixels = Pixels(
        spec.mean, spec.std, torch.device(device), crop=chosen == "crop-flip", flip=chosen.endswith("flip"), seed=seed
    )
    crop = Crop(random=chosen == "resized-crop-flip", seed=seed)
    size = resolution if callable(resolution) else lambda epoch: resolution or spec.resolution

    if use_ffcv:
        beton = open_beton(beton_path)
        classes = spec.classes or int(beton.labels.max()) + 1
        _check_fits(beton, spec, classes, photographs)
        return FFCVLoader(beton, sampler(len(beton)), pixels, crop, size, classes, workers)
    if photographs:
        folder = read_folder(data_dir, split)
        return FolderLoader(folder, sampler(len(folder)), pixels, crop, size, workers)
    arrays = read_arrays(dataset, split, data_dir, download)
    return MemoryLoader(arrays, sampler(len(arrays)), pixels, spec.classes or 0)


def _choose_augment(augment: Augment, spec: DataSet, photographs: bool) -> str:
    chosen = spec.augment if augment == "auto" else augment
    if chosen != "none" and photographs != (chosen == "resized-crop-flip"):
        raise DataError(f"{spec.name} cannot be augmented with {chosen!r}: use --augment auto or none")
    return chosen


def _check_fits(beton: Beton, spec: DataSet, classes: int, photographs: bool) -> None:
    expected = None if photographs else (spec.channels, spec.resolution, spec.resolution)
    if beton.shape != expected:
        raise DataError(
            f"{beton.path} holds {_describe(beton.shape)} where {spec.name} has {_describe(expected)}; "
            "write it with tools/write_beton.py"
        )
    if not beton.labels.max() < classes:
        raise DataError(f"{beton.path} has label {beton.labels.max()}, and {spec.name} has {classes} classes")
    if classes < 2:
        raise DataError(f"{beton.path} has a single class; a classifier needs at least two")


def _describe(shape: tuple[int, ...] | None) -> str:
    return "photographs" if shape is None else f"arrays of {' x '.join(map(str, shape))}"
