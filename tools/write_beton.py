"""Convert a data set to FFCV's `.beton` files, where the recipes' `--loader ffcv` finds them.

    python tools/write_beton.py mnist --data-dir data --download
    python tools/write_beton.py imagenet --data-dir /data/imagenet --max-resolution 500 --jpeg-share 0.5
    python tools/write_beton.py imagenet --data-dir /data/imagenet --splits test --shorter-side 256 --jpeg-share 0

Needs no FFCV. A file appears under its name only when it is whole, read back and on disk; a killed conversion leaves
at most a `.partial` file, which the next one overwrites.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import project_paths  # noqa: F401
import tyro
from data import DataError
from data.beton_writer import PAGE_SIZE, ArraySource, FolderSource, Source, write_beton
from data.cpus import cpus_of_a_process
from data.datasets import read_arrays
from data.folder import Split, read_folder


@dataclass(frozen=True)
class Config:
    """Write DATASET-train.beton and DATASET-test.beton."""

    dataset: tyro.conf.Positional[Literal["mnist10k", "mnist", "fashion-mnist", "cifar10", "imagenet"]]
    """imagenet: any folder with train/CLASS/* and val/CLASS/*; mnist10k: the digits that come with the recipes"""
    data_dir: Path = Path("data")
    """where the images are: torchvision's layout, IDX files, or train/ and val/ (imagenet, cifar10)"""
    out: Path | None = None
    """where the files go; None: into data_dir"""
    splits: tuple[Split, ...] = ("train", "test")
    download: bool = False
    """let torchvision fetch mnist, fashion-mnist or cifar10 first"""
    max_resolution: int | None = None
    """imagenet: reduce larger images to this longest side in pixels; None: keep them"""
    shorter_side: int | None = None
    """imagenet: resize every image to this shorter side in pixels, as torchvision's Resize does; raw test images of 256
    are what a pretrained checkpoint expects"""
    jpeg_share: float = 1.0
    """imagenet: share of images stored as JPEG, the others as raw pixels: larger and faster; ffcv-imagenet uses 0.5"""
    quality: int = 90
    """imagenet: of images that must be encoded; a JPEG file that needs no change is kept byte for byte"""
    page_size: int = PAGE_SIZE
    """in bytes, a power of two; an image must fit into a page"""
    workers: int = cpus_of_a_process()
    """threads that read, check and encode"""


def convert(config: Config) -> list[Path]:
    """Write the files of each split; see `Config`."""
    paths = []
    for split in config.splits:
        source: Source
        if config.dataset == "imagenet":
            folder = read_folder(config.data_dir, split)
            source = FolderSource(folder, config.max_resolution, config.jpeg_share, config.quality, config.shorter_side)
        else:
            source = ArraySource(read_arrays(config.dataset, split, config.data_dir, config.download))
        path = (config.out or config.data_dir) / f"{config.dataset}-{split}.beton"
        write_beton(path, source, workers=config.workers, page_size=config.page_size, progress=True)
        print(f"{path}: {len(source)} images, {path.stat().st_size / 1e6:.1f} MB, read back")
        paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Convert as the command line says."""
    try:
        convert(tyro.cli(Config, args=arguments, description=__doc__))
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was left behind")


if __name__ == "__main__":
    main()
