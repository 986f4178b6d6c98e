"""The first command of the README: it trains, reports, draws, resumes bit-exactly and explains what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spiral_mlp
import torch
from engine import RunError
from engine.errors import explained
from engine.lock import claim
from engine.output import best_effort_output
from PIL import Image
from unpainted import leave_unpainted

import rdp
from rdp.analysis import spiral
from rdp.tensorboard import Panels

TINY = ["--depth", "3", "--width", "4", "--epochs", "2", "--samples", "512", "--pictures", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is painted, tests/tensorboard looks at."""
    leave_unpainted(monkeypatch)


@pytest.mark.slow
def test_the_quick_preset_separates_the_spirals_with_every_algorithm(tmp_path: Path) -> None:
    results = spiral_mlp.main(["--out", str(tmp_path / "run"), "--pictures", "1"])
    assert list(results) == ["standard", "droppath", "rdp"]
    for name, result in results.items():
        assert result.accuracy > 0.97, name
        assert 0 < result.reuse.reused < 1
        assert [lesion.name for lesion in result.lesions.table] == [f"layers.{i}" for i in range(6)]
        assert result.lesions.whole == 100 * result.accuracy
        assert result.relative_flops == 1 if name == "standard" else 0.5 < result.relative_flops < 1.1


def test_it_says_where_the_pictures_and_events_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    spiral_mlp.main(["--out", str(folder), *TINY])
    printed = capsys.readouterr().out
    assert f"-m tensorboard.main --logdir {folder}" in printed
    assert "without one" in printed
    assert "overhead in so small a network" in printed
    assert (folder / "lesions.png").read_bytes().startswith(b"\x89PNG")
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


class Crash(BaseException):
    """The stand-in for a power cut: nothing may catch it."""


def crash() -> None:
    raise Crash


def run_cut(monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], None], folder: Path, *arguments: str) -> None:
    """Run the recipe, and do something in the middle of the `at`-th step."""
    log, calls = Panels.log, itertools.count()

    def cut(self: Panels, step: int, **metrics: float) -> None:
        if next(calls) == at:
            do()
        log(self, step, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Panels, "log", cut)
        spiral_mlp.main(["--out", str(folder), *TINY, "--epochs", "4", *arguments])


@functools.cache
def whole_run(algorithm: str) -> dict[str, Any]:
    """The last checkpoint of a run that nothing has cut."""
    with tempfile.TemporaryDirectory() as folder:
        spiral_mlp.main(["--out", f"{folder}/whole", *TINY, "--epochs", "4", "--algorithm", algorithm])
        return torch.load(f"{folder}/whole/{algorithm}/checkpoint.pt", weights_only=True)


def assert_resumes_bit_exactly(cut: Path, algorithm: str) -> None:
    spiral_mlp.main(["--resume", str(cut)])
    expected, resumed = whole_run(algorithm), torch.load(cut / algorithm / "checkpoint.pt", weights_only=True)
    assert (expected["epoch"], expected["step"]) == (resumed["epoch"], resumed["step"]) == (4, 0)
    for part in ("model", "handle", "optimizer", "schedule", "snapshots"):
        torch.testing.assert_close(flat(resumed[part]), flat(expected[part]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("algorithm", "at"),
    [
        ("rdp", 3),  # between DROP and FREEZE
        ("rdp", 4),  # between two epochs
        pytest.param("rdp", 5, marks=pytest.mark.slow),
        *(pytest.param(name, at, marks=pytest.mark.slow) for name in ("standard", "droppath") for at in (3, 4, 5)),
    ],
)
def test_a_killed_run_resumes_bit_exactly(
    algorithm: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run(algorithm)  # by the usual clock
    # A checkpoint after every step, whatever the clock says; an epoch has two.
    ticks = itertools.count(step=100)
    monkeypatch.setattr(spiral_mlp.time, "monotonic", lambda: next(ticks))
    with pytest.raises(Crash):
        run_cut(monkeypatch, at, crash, tmp_path / "cut", "--algorithm", algorithm)
    saved = torch.load(tmp_path / "cut" / algorithm / "checkpoint.pt", weights_only=True)
    assert 2 * saved["epoch"] + saved["step"] == at
    assert_resumes_bit_exactly(tmp_path / "cut", algorithm)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGINT,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_the_step_and_stops(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = signal.signal(number, signal.default_int_handler)  # whatever it is here: nohup ignores one
    try:
        with pytest.raises(SystemExit) as stopped:
            run_cut(monkeypatch, 2, lambda: os.kill(os.getpid(), number), tmp_path / "cut", "--algorithm", "rdp")
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outside)
    assert f"go on with --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    saved = torch.load(tmp_path / "cut" / "rdp" / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 1)  # the step that was begun is done
    assert_resumes_bit_exactly(tmp_path / "cut", "rdp")


def test_a_signal_in_the_last_step_stops_before_the_next_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        run_cut(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM), tmp_path / "cut")
    assert not (tmp_path / "cut" / "droppath").exists()


def test_one_run_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.lock.PATIENCE", 0.0)
    with claim(tmp_path / "run"):
        for arguments in (["--out", str(tmp_path / "run"), *TINY], ["--resume", str(tmp_path / "run")]):
            with pytest.raises(RunError, match=f"{tmp_path}/run is in use by process {os.getpid()} on"):
                spiral_mlp.main(arguments)
    spiral_mlp.main(["--out", str(tmp_path / "run"), *TINY, "--algorithm", "standard"])
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_that_is_removed_while_the_run_goes_on_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit), best_effort_output(), explained():
        run_cut(monkeypatch, 2, lambda: shutil.rmtree(run), run, "--algorithm", "rdp")
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(f"^error: cannot (use|write) {run}/rdp/[^ ]*: No such file or directory", said, re.MULTILINE)
    assert not run.exists()


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
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--rate", "1.5"], "--rate must be at least 0 and below 1, not 1.5"),
        (["--rate", "nan"], "--rate must be .*, not nan"),
        (["--lr", "inf"], "--lr must be a number up to .*, not inf"),
        (["--lr", "-1"], "--lr must be above 0, not -1.0"),
        (["--betas", "0.9", "2"], r"--betas must be .*, not \(0.9, 2.0\)"),
        (["--pictures", "-1"], "--pictures must be at least 0, not -1"),
        (["--seed", "99999999999999999999"], r"--seed must be at least 0 and below 4294967296"),
        (["--device", "abacus"], "--device abacus cannot be used: "),
        (["--resume", "nowhere"], "nowhere is no folder of a run"),
        (
            ["--out", "/dev/null/run"],
            "cannot make the results folder /dev/null/run: .*choose another --out",
        ),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=message):
        spiral_mlp.main([*TINY, *arguments] if "--resume" not in arguments else arguments)
    assert not list(tmp_path.iterdir())  # so that the right command is not told that the folder holds a run


def test_a_resumed_run_takes_no_other_settings(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"leave out --preset, --epochs, --batch-size$"):
        spiral_mlp.main(["--resume", str(tmp_path), "--preset", "paper-large", "--epochs", "3", "--batch-size", "8"])


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"betas": 1}', '{"betas": [0, 0], "nonsense": 1}'])
def test_a_folder_whose_settings_are_damaged_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=f"{tmp_path} is no folder of a run"):
        spiral_mlp.main(["--resume", str(tmp_path)])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    spiral_mlp.main(["--out", str(tmp_path / "run"), *TINY, "--algorithm", "rdp"])
    checkpoint = tmp_path / "run" / "rdp" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=f"{checkpoint} is damaged, remove it"):
        spiral_mlp.main(["--resume", str(tmp_path / "run")])


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="holds a run already"):
        spiral_mlp.main(["--out", str(tmp_path), *TINY])


@functools.cache
def trained(config: spiral_mlp.Config) -> dict[str, Any]:
    """A checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        spiral_mlp.train("rdp", config, Path(folder))
        return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("part", ["model", "optimizer", "handle", "schedule", "epoch", "step", "snapshots"])
@pytest.mark.parametrize("value", [None, [], "text", ...])
def test_a_checkpoint_of_other_content_is_named(part: str, value: object, tmp_path: Path) -> None:
    config = spiral_mlp.configure([*TINY, "--algorithm", "rdp", "--epochs", "1"])
    path, state = tmp_path / "checkpoint.pt", trained(config)
    torch.save({k: v for k, v in state.items() if k != part} | ({} if value is ... else {part: value}), path)
    with pytest.raises(RunError, match=f"{path} is damaged, remove it"):
        spiral_mlp.train("rdp", config, tmp_path)
