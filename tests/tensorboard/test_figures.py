"""tools/figures.py: the paper's figures from a checkpoint of the recipe, and runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import comparison
import pytest
import spiral_mlp
import torch
from PIL import Image

from tools import figures


def test_figures_1_to_4(spiral_runs: Path, tmp_path: Path) -> None:
    figures.draw(spiral_runs / "0" / "rdp" / "checkpoint.pt", tmp_path)
    sizes = {}
    for number in range(1, 5):
        with Image.open(tmp_path / f"figure{number}.png") as image:
            sizes[number] = image.size
    assert sizes[1][1] > 10 * 80  # all 10 nodes
    assert sizes[3] == (1400, 1240)
    assert sizes[4][1] > 3 * 6 * 168  # three moments, with 6 nodes each


def test_the_film_shows_training_from_the_start(spiral_runs: Path) -> None:
    checkpoint = figures.load(spiral_runs / "0" / "rdp" / "checkpoint.pt")
    assert list(checkpoint["snapshots"]) == [0, 1]
    torch.manual_seed(0)
    untrained = spiral_mlp.ResidualMLP(3, 10).state_dict()
    for name, value in untrained.items():
        assert torch.equal(checkpoint["snapshots"][0][name], value)


def test_runs_are_compared_over_seeds(spiral_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures.compare((spiral_runs / "0", spiral_runs / "1"), tmp_path)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("standard", "2"), ("droppath", "2"), ("rdp", "2")]
    results = [json.loads((spiral_runs / seed / "rdp" / "result.json").read_text()) for seed in "01"]
    values = torch.tensor([result["top1"] for result in results])
    assert rows[2][3].strip() == f"{values.mean():.2f} ± {values.std():.2f}"
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.size[0] > 1300  # of a figure of 6.8 inches
    before = (tmp_path / "comparison.pdf").read_bytes()
    assert b"/CIDFontType2" in before  # letters, not curves
    assert b"/Subtype /Image" not in before
    figures.compare((spiral_runs,), tmp_path)  # the same runs, by the folder above them
    assert (tmp_path / "comparison.pdf").read_bytes() == before


def left(folder: Path, *, algorithm: str = "rdp", seed: int = 0, without: str = "", **settings: object) -> Path:
    """A run as a recipe leaves it, but without similarity and lesions."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed, "out": str(folder), **settings}))
    result = {"dataset": "mnist", "model": "resnet18", "algorithm": algorithm, "seed": seed, "top1": 90.0 + seed}
    result |= {"train_seconds": 3.0, "relative_flops": 0.7}
    result.pop(without, None)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def labels(groups: comparison.Groups) -> list[tuple[str, int]]:
    return [(name, len(runs)) for name, runs in groups.items()]


def test_groups_are_named_by_what_differs(tmp_path: Path) -> None:
    left(tmp_path / "a" / "seed-0", mode="row", lr=0.1)
    left(tmp_path / "a" / "seed-1", mode="row", lr=0.1, seed=1)
    left(tmp_path / "b", mode="batch", lr=0.1)
    left(tmp_path / "c", algorithm="standard", mode="row", lr=0.3)
    groups = comparison.grouped(comparison.read_runs((tmp_path,)))
    assert labels(groups) == [("standard", 1), ("rdp, mode batch", 1), ("rdp, mode row", 2)]
    figure = comparison.comparison_figure(groups)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["needs similarity.json", "needs a run with --lesions"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(groups)


def test_figures_show_what_was_measured(spiral_runs: Path) -> None:
    groups = comparison.grouped(comparison.read_runs((spiral_runs,)))
    near, cut, right, cost = comparison.comparison_figure(groups).axes
    for place, (name, runs) in enumerate(groups.items()):
        cka = torch.tensor([r.similarity["cka"] for r in runs])
        assert torch.allclose(torch.tensor(near.lines[place].get_ydata()), cka.mean(0).double()), name
        left_over = torch.tensor([list(r.result["lesions"]["least"].values()) for r in runs])
        assert torch.allclose(torch.tensor(cut.lines[place].get_ydata()), left_over.mean(0).double()), name
        assert sorted(right.lines[2 * place].get_xdata()) == sorted(r.result["top1"] for r in runs)
        assert list(cost.lines[2 * place].get_xdata()) == [r.result["relative_flops"] for r in runs]


def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path: Path, spiral_runs: Path) -> None:
    one, two = left(tmp_path / "one"), left(tmp_path / "two")
    wrong = {
        "is no folder": (tmp_path / "missing",),
        "holds no result.json of a finished run": (tmp_path,),
        "only one finished run": (one,),
        "one and .*two have the same settings and seed": (one, two),
        "only one finished run in no folder": (),
        "two/result.json is damaged": (one, two),
        "three/result.json lacks 'top1'": (one, left(tmp_path / "three", without="top1")),
    }
    for sentence, folders in wrong.items():
        if "holds no" in sentence:
            (empty := tmp_path / "empty").mkdir()
            folders = (empty,)
        if "damaged" in sentence:
            (two / "result.json").write_text("{")
        with pytest.raises(SystemExit, match=sentence) as told:
            figures.compare(folders, tmp_path / "out")
        assert "\n" not in str(told.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"cannot write to .*file: File exists"):
        figures.compare((spiral_runs,), tmp_path / "file")


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot read the checkpoint"):
        figures.draw(tmp_path / "missing.pt", tmp_path)
    (tmp_path / "garbage.pt").write_text("garbage")
    with pytest.raises(SystemExit, match="cannot read the checkpoint"):
        figures.draw(tmp_path / "garbage.pt", tmp_path)
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="is no checkpoint of"):
        figures.draw(tmp_path / "other.pt", tmp_path)
