"""tools/figures.py: the paper's figures from a checkpoint of the recipe, and the table over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import spiral_mlp
import torch
from PIL import Image

from tools import figures

TINY = ["--depth", "3", "--width", "10", "--epochs", "2", "--samples", "512", "--pictures", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        spiral_mlp.main([*TINY, "--seed", str(seed), "--out", str(folder / str(seed))])
    return folder


def test_figures_1_to_4(run: Path, tmp_path: Path) -> None:
    figures.draw(run / "0" / "rdp" / "checkpoint.pt", tmp_path)
    sizes = {}
    for number in range(1, 5):
        with Image.open(tmp_path / f"figure{number}.png") as image:
            sizes[number] = image.size
    assert sizes[1][1] > 10 * 50  # all 10 nodes
    assert sizes[3] == (700, 580)
    assert sizes[4][1] > 2 * 300  # a film strip


def test_the_film_shows_training_from_the_start(run: Path) -> None:
    checkpoint = figures.load(run / "0" / "rdp" / "checkpoint.pt")
    assert list(checkpoint["snapshots"]) == [0, 1]
    torch.manual_seed(0)
    untrained = spiral_mlp.ResidualMLP(3, 10).state_dict()
    for name, value in untrained.items():
        assert torch.equal(checkpoint["snapshots"][0][name], value)


def test_the_table_is_over_seeds(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures.compare((run / "0", run / "1"), tmp_path)
    printed = capsys.readouterr().out
    assert "depth 3, width 10, 2 epochs" in printed
    rows = [line.split("|") for line in printed.splitlines() if line.startswith(("| standard", "| droppath", "| rdp"))]
    assert [row[2].strip() for row in rows] == ["2", "2", "2"]
    measured = [figures.measure(figures.load(run / seed / "rdp" / "checkpoint.pt")) for seed in "01"]
    values = torch.tensor([100 * m.accuracy for m in measured])
    assert rows[2][3].strip() == f"{values.mean():.2f} ± {values.std():.2f}"
    assert (tmp_path / "comparison_depth_3.png").exists()


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot read the checkpoint"):
        figures.draw(tmp_path / "missing.pt", tmp_path)
    (tmp_path / "garbage.pt").write_text("garbage")
    with pytest.raises(SystemExit, match="cannot read the checkpoint"):
        figures.draw(tmp_path / "garbage.pt", tmp_path)
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="is no checkpoint of"):
        figures.draw(tmp_path / "other.pt", tmp_path)
    with pytest.raises(SystemExit, match=r"checkpoint.pt of any algorithm"):
        figures.compare((tmp_path,), tmp_path)
