"""Runs of the spiral recipe, which several files look at."""

from pathlib import Path

import pytest
import spiral_mlp
from unpainted import leave_unpainted

TINY = ["--depth", "3", "--width", "10", "--epochs", "2", "--samples", "512", "--pictures", "2"]


@pytest.fixture(scope="session")
def spiral_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two seeds, "0" and "1", of all algorithms; 4 steps each. The charts of the second are empty."""
    folder = tmp_path_factory.mktemp("runs")
    spiral_mlp.main([*TINY, "--seed", "0", "--out", str(folder / "0")])
    with pytest.MonkeyPatch.context() as patch:
        leave_unpainted(patch)
        spiral_mlp.main([*TINY, "--seed", "1", "--out", str(folder / "1")])
    return folder
