"""How fast each loader makes training batches: FFCV, ours without it, and the usual DataLoader with PIL.

    python tools/benchmark_loaders.py

Generates its images, runs all loaders in turns in one process, and prints one table of images/s and ratios.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import project_paths  # noqa: F401
import tyro
from data import LoaderChoice
from data.cpus import cpus_of_a_process
from engine import explained, interruptible


@dataclass(frozen=True)
class Config:
    """Measure the throughput of loaders on this machine."""

    small_images: int = 20_000
    """of 32 x 32 pixels, padded, cropped and flipped as CIFAR-10's are"""
    photographs: int = 600
    """JPEG files of about 500 x 375 pixels, random-resized-cropped to 224 and flipped as ImageNet's are"""
    batch_size: int = 128
    rounds: int = 5
    """timed epochs of each loader, in turns; the table shows medians"""
    workers: int = cpus_of_a_process()
    """threads or processes of each loader"""


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Config, description=__doc__)


with interruptible():
    import numpy as np
    import torch
    from data.beton_writer import ArraySource, FolderSource, write_beton
    from data.datasets import DATASETS, Arrays
    from data.ffcv_loader import FFCVLoader, ffcv_is_installed
    from data.folder import read_folder
    from data.loader import make_loader
    from data.memory_loader import MemoryLoader
    from data.sampling import Sampler, subset
    from data.transforms import Crop, Pixels
    from engine.progress import tqdm
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

Epoch = Callable[[], Iterable[object]]


class PILImages(Dataset[tuple[torch.Tensor, int]]):
    """Arrays as PIL images: what torchvision's CIFAR10 does."""

    def __init__(self, arrays: Arrays, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._arrays = arrays
        self._transform = transform

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self._arrays.images[index].transpose(1, 2, 0))
        return self._transform(image), int(self._arrays.labels[index])


def pil_loader(dataset: Dataset[tuple[torch.Tensor, int]], config: Config) -> Epoch:
    """The usual loader."""
    loader = DataLoader(
        dataset, config.batch_size, shuffle=True, num_workers=config.workers, persistent_workers=config.workers > 0
    )
    return lambda: loader


def small_loaders(folder: Path, config: Config, stack: ExitStack) -> dict[str, Epoch]:
    """Loaders of the same 32 x 32 images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (config.small_images, 3, 32, 32), dtype=np.uint8)
    arrays = Arrays(images, rng.integers(0, 10, config.small_images))
    cifar = DATASETS["cifar10"]
    sampler = Sampler(subset(len(arrays), None), config.batch_size, train=True)
    pixels = Pixels(cifar.mean, cifar.std, torch.device("cpu"), crop=True, flip=True)
    pil = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(cifar.mean, cifar.std),
        ]
    )
    loaders: dict[str, Epoch] = {"DataLoader + PIL": pil_loader(PILImages(arrays, pil), config)}
    memory = stack.enter_context(closing(MemoryLoader(arrays, sampler, pixels, 10)))
    loaders["ours, in memory"] = lambda: memory.epoch(0)
    if ffcv_is_installed():
        file = write_beton(folder / "small.beton", ArraySource(arrays), workers=config.workers)
        ffcv = stack.enter_context(
            closing(FFCVLoader(file, sampler, pixels, Crop(random=False), lambda _: 32, 10, config.workers))
        )
        loaders["FFCV, raw"] = lambda: ffcv.epoch(0)
    return loaders


def photograph_loaders(folder: Path, config: Config, stack: ExitStack) -> dict[str, Epoch]:
    """Loaders of the same photographs."""
    generate_photographs(folder, config.photographs)
    imagenet = DATASETS["imagenet"]
    pil = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(imagenet.mean, imagenet.std),
        ]
    )
    loaders: dict[str, Epoch] = {
        "DataLoader + PIL": pil_loader(ImageFolder(str(folder / "train"), transform=pil), config)
    }

    def ours(loader: LoaderChoice, data_dir: Path) -> Epoch:
        made = make_loader(
            "imagenet",
            "train",
            train=True,
            batch_size=config.batch_size,
            device="cpu",
            data_dir=data_dir,
            loader=loader,
            workers=config.workers,
        )
        stack.enter_context(closing(made))
        return lambda: made.epoch(0)

    loaders["ours, no FFCV"] = ours("torch", folder)
    if ffcv_is_installed():
        for name, jpeg_share in (("FFCV, JPEG", 1.0), ("FFCV, half JPEG", 0.5), ("FFCV, raw", 0.0)):
            data_dir = folder / f"jpeg{jpeg_share}"
            source = FolderSource(read_folder(folder, "train"), jpeg_share=jpeg_share)
            write_beton(data_dir / "imagenet-train.beton", source, workers=config.workers)
            loaders[name] = ours("ffcv", data_dir)
    return loaders


def generate_photographs(folder: Path, count: int) -> None:
    """Smooth colours with some grain: about as many bytes a pixel as a photograph."""
    rng = np.random.default_rng(0)
    for index in range(count):
        width, height = (500, 375) if rng.random() < 0.75 else (375, 500)
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 8, (height, width, 1))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        path = folder / "train" / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def measure(loaders: dict[str, Epoch], images: int, rounds: int) -> dict[str, float]:
    """Images a second of each, the median over rounds in which the loaders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for round_ in tqdm(range(rounds + 1), unit="round"):
        for name, epoch in loaders.items():
            start = time.perf_counter()
            for _ in epoch():
                pass
            if round_ > 0:  # the first starts workers and compiles
                seconds[name].append(time.perf_counter() - start)
    return {name: images / statistics.median(times) for name, times in seconds.items()}


def main(config: Config) -> None:
    """Measure and print the table."""
    if min(config.small_images, config.batch_size, config.rounds, config.workers) < 1 or config.photographs < 2:
        sys.exit("all numbers must be at least 1, and --photographs 2: one of each class")
    if not ffcv_is_installed():
        print("FFCV is not installed: its rows are missing (docs/data.md says how to install it).")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        small = measure(small_loaders(Path(folder), config, stack), config.small_images, config.rounds)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        large = measure(photograph_loaders(Path(folder), config, stack), config.photographs, config.rounds)
    print(f"\n{config.workers} workers, batches of {config.batch_size}, medians of {config.rounds} epochs\n")
    print(f"| {'images':13} | {'loader':17} | images/s | ratio |\n|{'-' * 15}|{'-' * 19}|---------:|------:|")
    for images, rates in (("32 x 32", small), ("JPEG to 224", large)):
        baseline = next(iter(rates.values()))
        for name, rate in rates.items():
            print(f"| {images:13} | {name:17} | {rate:8,.0f} | {rate / baseline:5.1f} |")


if __name__ == "__main__":
    with explained(less="choose fewer --photographs"):
        main(args)
