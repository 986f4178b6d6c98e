"""The first command of the README: it trains, reports, draws, resumes bit-exactly and explains what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import spiral_mlp
import torch
from PIL import Image

import rdp
from rdp.analysis import spiral
from rdp.tensorboard import Panels

TINY = ["--depth", "3", "--width", "4", "--epochs", "2", "--samples", "512", "--pictures", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_quick_preset_separates_the_spirals_with_every_algorithm(tmp_path: Path) -> None:
    results = spiral_mlp.main(["--out", str(tmp_path / "run"), "--pictures", "1"])
    assert list(results) == ["standard", "droppath", "rdp"]
    for name, result in results.items():
        assert result.accuracy > 0.97, name
        assert 0 < result.reuse.reused < 1


def test_it_says_where_the_pictures_and_events_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    spiral_mlp.main(["--out", str(folder), *TINY])
    printed = capsys.readouterr().out
    assert f"-m tensorboard.main --logdir {folder}" in printed
    for algorithm in ("standard", "droppath", "rdp"):
        assert algorithm in printed
        assert list((folder / algorithm).glob("events.out.tfevents.*"))
        for picture in ("features_nodes", "features_similarity", "training_overview"):
            with Image.open(folder / algorithm / f"{picture}.png") as image:
                assert min(image.size) >= 500


def test_presets_are_section_3_1_and_every_value_can_be_overridden() -> None:
    small, large = spiral_mlp.configure(["--preset", "paper-small"]), spiral_mlp.configure(["--preset=paper-large"])
    assert (small.depth, small.width, large.depth, large.width) == (6, 6, 32, 32)
    for config in (small, large):
        paper = (config.lr, config.betas, config.batch_size, config.epochs, config.samples, config.anneal)
        assert paper == (0.1, (0.9, 0.999), 256, 1000, 16_384, False)
    changed = spiral_mlp.configure(["--preset", "paper-large", "--width", "8", "--betas", "0.8", "0.9", "--anneal"])
    assert changed == dataclasses.replace(large, width=8, betas=(0.8, 0.9), anneal=True)


def test_the_model_has_a_residual_connection_on_every_layer() -> None:
    model = spiral_mlp.ResidualMLP(5, 8)
    handle = rdp.attach(model, example_inputs=spiral(8)[0])
    assert [branch.name for branch in handle.branches] == [f"layers.{i}" for i in range(5)]
    assert {branch.kind for branch in handle.branches} == {"identity"}


@pytest.mark.parametrize("algorithm", ["standard", "droppath", "rdp"])
def test_a_killed_run_resumes_bit_exactly(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A checkpoint after every epoch, whatever the clock says.
    ticks = itertools.count(step=100)
    monkeypatch.setattr(spiral_mlp.time, "monotonic", lambda: next(ticks))
    arguments = [*TINY, "--epochs", "4", "--algorithm", algorithm]
    spiral_mlp.main(["--out", str(tmp_path / "whole"), *arguments])

    log, calls = Panels.log, itertools.count()

    def die_in_the_third_epoch(self: Panels, step: int, **metrics: float) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt
        log(self, step, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Panels, "log", die_in_the_third_epoch)
        with pytest.raises(SystemExit, match="go on with --resume"):
            spiral_mlp.main(["--out", str(tmp_path / "killed"), *arguments])
    spiral_mlp.main(["--resume", str(tmp_path / "killed")])

    whole, resumed = (
        torch.load(tmp_path / run / algorithm / "checkpoint.pt", weights_only=True) for run in ("whole", "killed")
    )
    assert whole["epoch"] == resumed["epoch"] == 4
    for part in ("model", "handle", "optimizer"):
        torch.testing.assert_close(flat(resumed[part]), flat(whole[part]), rtol=0, atol=0)


def flat(state: object) -> list[torch.Tensor]:
    """All tensors and numbers of a state dict, in order."""
    if isinstance(state, dict):
        return [t for value in state.values() for t in flat(value)]
    if isinstance(state, (list, tuple)):
        return [t for value in state for t in flat(value)]
    if isinstance(state, torch.Tensor):
        return [state]
    return [torch.tensor(state)] if isinstance(state, (int, float)) else []


def test_standard_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    config = spiral_mlp.configure([*TINY, "--algorithm", "standard", "--no-anneal"])
    spiral_mlp.train("standard", config, tmp_path)
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]

    torch.manual_seed(config.seed)
    model = spiral_mlp.ResidualMLP(config.depth, config.width)
    points, labels = spiral(config.samples, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.betas)
    for epoch in range(config.epochs):
        for batch in torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).split(256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(points[batch]), labels[batch]).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(trained[name], value), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "1"], "--width must be at least 2"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--rate", "1.5"], "--rate must be at least 0 and below 1; got 1.5"),
        (["--rate", "nan"], "--rate must be .*; got nan"),
        (["--lr", "inf"], "--lr must be a number above 0; got inf"),
        (["--lr", "-1"], "--lr must be .*; got -1.0"),
        (["--betas", "0.9", "2"], r"--betas must be .*; got \(0.9, 2.0\)"),
        (["--pictures", "-1"], "--pictures must be at least 0; got -1"),
        (["--seed", "99999999999999999999"], r"--seed must be at least 0 and below 2\*\*32"),
        (["--device", "abacus"], "--device abacus cannot be used: "),
        (["--resume", "nowhere"], "nowhere is no folder of a run"),
        (["--out", "/dev/null/run"], "cannot write to /dev/null/run"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        spiral_mlp.main([*TINY, *arguments] if "--resume" not in arguments else arguments)
    assert not list(tmp_path.iterdir())  # so that the right command is not told that the folder holds a run


def test_a_resumed_run_takes_no_other_settings(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"leave out --preset, --epochs, --batch-size$"):
        spiral_mlp.main(["--resume", str(tmp_path), "--preset", "paper-large", "--epochs", "3", "--batch-size", "8"])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"betas": 1}', '{"betas": [0, 0], "nonsense": 1}'])
def test_a_folder_whose_settings_are_damaged_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit, match=f"{tmp_path} is no folder of a run"):
        spiral_mlp.main(["--resume", str(tmp_path)])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    spiral_mlp.main(["--out", str(tmp_path / "run"), *TINY, "--algorithm", "rdp"])
    checkpoint = tmp_path / "run" / "rdp" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=f"{checkpoint} is damaged, remove it"):
        spiral_mlp.main(["--resume", str(tmp_path / "run")])


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds a run already"):
        spiral_mlp.main(["--out", str(tmp_path), *TINY])


@pytest.mark.parametrize("part", ["model", "optimizer", "handle", "schedule", "epoch", "snapshots"])
@pytest.mark.parametrize("value", [None, [], "text", ...])
def test_a_checkpoint_of_other_content_is_named(part: str, value: object, tmp_path: Path) -> None:
    config = spiral_mlp.configure([*TINY, "--algorithm", "rdp", "--epochs", "1"])
    spiral_mlp.train("rdp", config, tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != part} | ({} if value is ... else {part: value}), path)
    with pytest.raises(SystemExit, match=f"{path} is damaged, remove it"):
        spiral_mlp.train("rdp", config, tmp_path)
