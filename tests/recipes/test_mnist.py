"""The MNIST recipe as it is run: real digits, from the command line, with each algorithm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mnist import QUICK, MnistConfig, configure

RECIPE = Path(__file__).parents[2] / "recipes" / "mnist.py"


def test_the_defaults_are_the_papers() -> None:
    config = configure([])
    assert config == MnistConfig()
    assert (config.model, config.batch_size, config.seeds, config.rate, config.mode, config.small_stem) == (
        ("resnet50", 128, 5, 0.1, "row", False)
    )


def test_quick_changes_only_what_is_not_said() -> None:
    assert configure(["--quick"]) == QUICK
    assert configure(["--quick", "--epochs", "7", "--model", "resnet50"]) == QUICK.replace(epochs=7, model="resnet50")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "algorithm",
    [
        ["--algorithm", "standard", "--lesions"],
        ["--algorithm", "droppath"],
        ["--algorithm", "rdp"],
        ["--algorithm", "rdp", "--mode=batch"],
    ],
    ids=" ".join,
)
def test_quick_learns_real_digits(algorithm: list[str], tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(RECIPE), "--quick", *algorithm, "--no-progress", "--out", str(tmp_path)],
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert result["top1"] > 95
    if "--lesions" in algorithm:
        assert result["lesions"]["whole"] == pytest.approx(result["top1"])
        assert len(result["lesions"]["table"]) == 8
