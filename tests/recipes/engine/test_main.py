"""A recipe from its command line, in this process: what it leaves behind, and how it refuses."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import mnist
import pytest
import torch
from data import DataError
from engine import RunError, checkpoint, command_line
from engine.errors import explained
from engine.main import main
from engine.start import interruptible
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rdp

TINY = ["--quick", "--model", "test_resnet", "--limit", "256", "--batch-size", "64", "--no-progress", "--device", "cpu"]


def recipe(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist.py", *TINY, *args])
    main(command_line(mnist.configure), mnist.run)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the recipe says when it stops with status 1; it must be one line without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        recipe(monkeypatch, *args)
    assert stopped.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    return said.removeprefix("error: ")


def test_a_run_leaves_its_settings_environment_numbers_and_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    recipe(monkeypatch, "--algorithm", "rdp", "--rate", "0.2", "--seeds", "2", "--epochs", "2", "--out", str(out))
    assert "rate = 0.2" in capsys.readouterr().out  # the configuration is echoed
    assert sorted(path.name for path in out.iterdir()) == ["cost.json", "seed-0", "seed-1"]
    for seed in range(2):
        folder = out / f"seed-{seed}"
        config = json.loads((folder / "config.json").read_text())
        assert (config["rate"], config["dataset"], config["model"]) == (0.2, "mnist10k", "test_resnet")
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
        assert {"git_commit", "command", "gpus", "processes"} <= environment.keys()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [(line["epoch"], line["step"]) for line in lines] == [(0, 4), (1, 8)]
        result = json.loads((folder / "result.json").read_text())
        assert (result["seed"], result["steps"], result["top1"]) == (seed, 8, lines[-1]["top1"])
        assert 0 <= result["top1"] <= result["top5"] <= 100
        state = checkpoint.load_latest(folder / "checkpoints")
        assert state is not None
        assert {"model", "optimizer", "scaler", "ema", "processes", "epoch", "step", "history"} <= state.keys()
        assert state["history"] == lines
        written = EventAccumulator(str(folder / "tensorboard")).Reload()
        for tag in ("train/loss", "train/lr", "test/loss", "test/top1", "test/top5", "time/images_per_second"):
            assert [event.step for event in written.Tensors(tag)] == [4, 8], tag
        (final,) = written.Tensors("final/top1")
        assert final.tensor_proto.float_val[0] == pytest.approx(result["top1"])
        similarity = json.loads((folder / "similarity.json").read_text())
        assert similarity["cka"][0] == pytest.approx(1)
        assert len(similarity["cka"]) == len(similarity["distance"]) > 2
    weights = [checkpoint.load_latest(out / f"seed-{s}" / "checkpoints")["model"]["conv1.0.weight"] for s in range(2)]
    assert not torch.equal(*weights)


def test_a_folder_in_use_a_finished_run_and_other_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--algorithm", "standard", "--epochs", "1", "--out", str(tmp_path)]
    recipe(monkeypatch, *args)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = refusal(monkeypatch, capsys, *args)
    assert said == f"{tmp_path}/seed-0 already holds a run: go on with --resume, or choose another --out"
    said = refusal(monkeypatch, capsys, *args, "--resume", "--lr", "0.3")
    assert said == f"{tmp_path}/seed-0 was started with other settings, so --resume is refused: lr: 0.1 -> 0.3"
    recipe(monkeypatch, *args, "--resume")
    assert f"{tmp_path}/seed-0 is finished: nothing to do\n" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--batch-size", "100", "--accumulate", "3"], "a batch of 100 cannot be shared equally"),
        (["--rate", "1.5"], "--rate must be at least 0 and below 1, not 1.5"),
        (["--model", "resnet51"], "timm has no model 'resnet51'"),
        (["--batch-size", "512"], "256 samples do not fill a batch of 512"),
        (["--dataset", "mnist", "--data-dir", "/nonexistent"], "/nonexistent"),
        (["--model", "vgg11"], "vgg11 cannot take images of 1 x 28 x 28: "),
        (["--lr", "nan"], "--lr must be a number up to 1e+30, not nan"),
        (["--epochs", "-3"], "--epochs must be at least 1, not -3"),
        (["--epochs", "5", "--warmup-epochs", "5"], "--warmup-epochs 5 do not end within --epochs 5"),
        (["--limit", "8501"], "--limit must be from 1 to the 8500 samples that there are, not 8501"),
        (["--augment", "resized-crop-flip"], "mnist10k cannot be augmented with 'resized-crop-flip'"),
        (["--optimizer", "sgdd"], "timm has no optimizer 'sgdd'"),
        (["--momentum", "0"], "timm's optimizer 'sgd' does not take"),
        (["--small-stem", "--model", "test_vit"], "--small-stem is for ResNets"),
        (["--devices", "3"], "a batch of 64 cannot be shared equally by 3 processes"),
    ],
)
def test_a_run_that_cannot_start_says_why_in_one_sentence_and_leaves_nothing(
    args: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert sentence in refusal(monkeypatch, capsys, "--out", str(out), *args)
    assert not out.exists()


def test_a_results_folder_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    said = refusal(monkeypatch, capsys, "--algorithm", "standard", "--out", str(tmp_path / "file" / "out"))
    folder = tmp_path / "file" / "out" / "seed-0"
    assert said == f"cannot make the results folder {folder}: Not a directory; choose another --out"


def test_nothing_to_resume_is_said_and_started_from_the_beginning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(monkeypatch, "--algorithm", "standard", "--epochs", "1", "--out", str(tmp_path), "--resume")
    assert f"nothing to resume in {tmp_path}/seed-0: starting from the beginning" in capsys.readouterr().out


def test_interrupted_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist, "make_model", interrupted)
    with pytest.raises(SystemExit) as stopped:
        recipe(monkeypatch, "--out", str(tmp_path / "out"))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; what was saved is untouched\n"
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(monkeypatch, capsys, "--algorithm", "standard", "--lr", "1e30", "--out", str(tmp_path))
    assert said.startswith("the training loss of epoch 1 is nan: try a lower --lr")
    assert not list(tmp_path.rglob("*.pt"))


def test_all_checkpoints_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--algorithm", "standard", "--epochs", "1", "--out", str(tmp_path)]
    recipe(monkeypatch, *args)
    (tmp_path / "seed-0" / "result.json").unlink()
    for path in tmp_path.rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refusal(monkeypatch, capsys, *args, "--resume")
    assert said.startswith(f"all 1 checkpoints in {tmp_path}/seed-0/checkpoints are damaged")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RunError("a"), "error: a"),
        (DataError("b"), "error: b"),
        (rdp.BranchError("c"), "error: c"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "error: out of memory (CUDA out of memory): choose a smaller --batch-size or a larger --accumulate",
        ),
        (MemoryError(), "error: out of memory (MemoryError): choose a smaller --batch-size or a larger --accumulate"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "error: out of memory ([Errno 12] Cannot allocate memory): "
            "choose a smaller --batch-size or a larger --accumulate",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "file"), "error: cannot use file: No space left on device"),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, explained():
        raise error
    assert stopped.value.code == 1
    assert capsys.readouterr().err == sentence + "\n"


def test_memory_that_torch_does_not_get_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), explained(less="choose fewer --samples"):
        torch.empty(1 << 50)
    expected = (
        rf"error: out of memory \(can't allocate memory: you tried to allocate {1 << 52} bytes\): choose fewer --s"
    )
    assert re.match(expected, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["mnist.py", "spiral_mlp.py"])
def test_too_little_memory_to_import_is_one_sentence(name: str) -> None:
    script = Path(mnist.__file__).with_name(name)
    line = f"ulimit -v 1500000; exec {sys.executable} {script}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert re.fullmatch(r"error: out of memory at the start \(.*\): give the process more than 4 GB .*\n", run.stderr)


def test_imports_that_fail_for_another_reason_keep_their_traceback() -> None:
    with pytest.raises(ImportError, match="no such name"), interruptible():
        raise ImportError("no such name")


@pytest.mark.parametrize("error", [KeyError("mistake"), RuntimeError("mistake"), OSError(errno.EIO, "broken")])
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), explained():
        raise error


@pytest.mark.parametrize("algorithm", ["standard", "rdp"])
def test_panels_are_drawn_and_change_nothing(algorithm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = []
    for name, panels in (("with", ["--panels", "4"]), ("without", [])):
        out = tmp_path / name
        recipe(monkeypatch, "--algorithm", algorithm, "--epochs", "1", "--out", str(out), *panels)
        state = checkpoint.load_latest(out / "seed-0" / "checkpoints")
        assert state is not None
        weights.append(state["model"])
        tags = EventAccumulator(str(out / "seed-0" / "tensorboard")).Reload().Tags()
        assert bool(panels) == any("features/similarity" in tag for tag in [*tags["images"], *tags["tensors"]])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
