"""Small photographs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))


def make_photographs(root: Path, *, train: int, val: int, classes: int = 3) -> Path:
    """`root/train/classC/*.jpg` and `root/val/classC/*.jpg`, of different sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            path = root / split / f"class{index % classes}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(rng, *rng.integers(40, 90, 2)).save(path, quality=95)
    return root


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photographs"), train=23, val=10)
