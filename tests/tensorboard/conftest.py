"""Runs of the spiral recipe, which several files look at."""

from pathlib import Path

import pytest
import spiral_mlp

TINY = ["--depth", "3", "--width", "10", "--epochs", "2", "--samples", "512", "--pictures", "2"]


@pytest.fixture(scope="session")
def spiral_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two seeds, "0" and "1", of all algorithms; 4 steps each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        spiral_mlp.main([*TINY, "--seed", str(seed), "--out", str(folder / str(seed))])
    return folder
