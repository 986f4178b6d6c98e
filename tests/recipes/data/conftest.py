"""Small photographs, and what to do with the tests of FFCV where it is not installed."""

import os
from pathlib import Path

import numpy as np
import pytest
from data.ffcv_loader import APT_PACKAGES, ffcv_is_installed
from PIL import Image

REASON = f"FFCV is not installed (bash tools/install_ffcv.sh; it needs {APT_PACKAGES})"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ffcv: runs the real FFCV; skipped without it, or fails with RDP_REQUIRE_FFCV=1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ffcv") and not ffcv_is_installed():
        if os.environ.get("RDP_REQUIRE_FFCV") == "1":
            pytest.fail(f"RDP_REQUIRE_FFCV=1 and {REASON}", pytrace=False)
        pytest.skip(REASON)


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
