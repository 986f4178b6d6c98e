"""The ImageNet recipe as it is run: one command, two CPU processes, real JPEG files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagenet_ffcv
import numpy as np
import pytest
import torch
from data.beton_writer import FolderSource, write_beton
from data.folder import Folder, read_folder
from data.folder_loader import FolderLoader
from engine import RunError, checkpoint, command_line
from engine.launch import World
from engine.main import main
from imagenet_ffcv import PRESETS, ImagenetConfig, blur_strides, configure, run
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

RECIPE = Path(imagenet_ffcv.__file__)
WRITE_BETON = RECIPE.parents[1] / "tools" / "write_beton.py"
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
SMALL = [
    "--model",
    "test_resnet",
    "--resolution",
    "64",
    "--test-resolution",
    "64",
    "--batch-size",
    "16",
    "--no-progress",
]
TWO = ["--devices", "2", "--device", "cpu", "--epochs", "2", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy JPEG files, 24 each for training and 7 for validation."""
    root = tmp_path_factory.mktemp("imagefolder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + rng.normal(0, 30, (70, 80, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.jpg")
    return root


def recipe(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(RECIPE), *SMALL, "--no-progress", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def replicas(out: Path) -> list[str]:
    """The fingerprints of the processes' final parameters."""
    state = checkpoint.load_latest(out / "seed-0" / "checkpoints")
    assert state is not None
    return [process["parameters"] for process in state["processes"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_command_trains_in_two_processes_that_end_bit_identical(folder: Path, tmp_path: Path) -> None:
    run = recipe(*TWO, "--data-dir", str(folder), "--out", str(tmp_path), "--loader", "torch", "--algorithm", "rdp")
    assert run.returncode == 0, run.stderr
    first, second = replicas(tmp_path)
    assert first == second
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert result["steps"] == 8
    assert json.loads((tmp_path / "seed-0" / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    common = [*TWO, "--data-dir", str(folder), "--loader", "torch"]
    ours = recipe(*common, "--out", str(tmp_path / "ours"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    theirs = recipe(*common, "--out", str(tmp_path / "theirs"), launcher=torchrun)
    assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr + theirs.stderr
    assert replicas(tmp_path / "ours") == replicas(tmp_path / "theirs")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_through_write_beton_and_ffcv(mode: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    write = [sys.executable, str(WRITE_BETON), "imagenet", "--data-dir", str(folder), "--out", str(tmp_path)]
    subprocess.run(write, check=True, timeout=300)
    run = recipe(*TWO, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--loader", "ffcv", "--mode", mode)
    assert run.returncode == 0, run.stderr
    first, second = replicas(tmp_path / "out")
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_to_the_command_saves_and_stops_all_its_processes(folder: Path, tmp_path: Path) -> None:
    arguments = [*TWO, "--epochs", "1000", "--data-dir", str(folder), "--out", str(tmp_path), "--loader", "torch"]
    command = [sys.executable, str(RECIPE), *SMALL, "--no-progress", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not list(tmp_path.rglob("*.pt")):
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        shown, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM
    assert f"stopped and saved in {tmp_path}/seed-0: go on with --resume" in shown
    first, second = replicas(tmp_path)
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_missing_data_is_one_sentence_from_all_processes_together(tmp_path: Path) -> None:
    run = recipe(*TWO, "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(tmp_path / "none") in errors[0]
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-24])


def write_text(path: Path) -> None:
    path.write_text("not a beton\n" * 1000)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut, "imagenet-train.beton is cut short or damaged: its table has 71 whole rows for 72 samples"),
        (write_text, "imagenet-train.beton is cut short or damaged: its version is"),
        (Path.unlink, "there is no file"),
    ],
)
def test_a_spoilt_beton_is_one_sentence(
    spoil: Callable[[Path], None],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "imagenet-train.beton"
    write_beton(file, FolderSource(read_folder(folder, "train")))
    spoil(file)
    arguments = ["--data-dir", str(tmp_path), "--loader", "ffcv", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["imagenet_ffcv.py", *SMALL, "--devices", "1", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main(command_line(configure), run)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert not (tmp_path / "out").exists()


@pytest.mark.ffcv
def test_a_beton_for_testing_of_other_classes_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = read_folder(folder, "train"), read_folder(folder, "test")
    write_beton(tmp_path / "imagenet-train.beton", FolderSource(train))
    two = [path for path, label in zip(test.paths, test.labels, strict=True) if label < 2]
    write_beton(tmp_path / "imagenet-test.beton", FolderSource(Folder(two, test.labels[: len(two)], test.classes[:2])))
    arguments = ["--data-dir", str(tmp_path), "--loader", "ffcv", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["imagenet_ffcv.py", *SMALL, "--devices", "1", *arguments])
    with pytest.raises(SystemExit):
        main(command_line(configure), run)
    assert "imagenet has 3 classes for training and 2 for testing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_preset_of_ffcv_imagenet_runs_from_one_end_to_the_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = FolderLoader.epoch

    def epoch(loader: FolderLoader, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in original(loader, number, start):
            sizes.append((number, len(images), images.shape[-1]))
            yield images, labels

    monkeypatch.setattr(FolderLoader, "epoch", epoch)
    smaller = ["--resolution", "64", "--start-resolution", "32", "--grow-from", "0", "--grow-until", "2"]
    smaller += ["--epochs", "3", "--warmup-epochs", "1", "--workers", "0", "--lr", "0.01"]
    arguments = ["--data-dir", str(folder), "--loader", "torch", "--device", "cpu", "--out", str(tmp_path), *smaller]
    monkeypatch.setattr("sys.argv", ["imagenet_ffcv.py", "--preset", "ffcv-16ep", *SMALL, "--devices", "1", *arguments])
    main(command_line(configure), run)
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert (result["epochs"], result["steps"]) == (3, 12)
    grown = [(epoch, size) for epoch, images, size in sizes if images == 16]
    assert grown[1:] == [(epoch, size) for epoch, size in enumerate((32, 64, 64)) for _ in range(4)]
    config = json.loads((tmp_path / "seed-0" / "config.json").read_text())
    assert (config["blurpool"], config["amp"], config["channels_last"], config["test_flip"]) == (
        True,
        "fp16",
        True,
        True,
    )


def test_the_defaults_are_the_papers() -> None:
    config = configure([])
    assert config == ImagenetConfig()
    assert (config.model, config.batch_size, config.devices, config.rate) == ("resnet50", 1024, 0, 0.1)
    assert {config.resolution_at(epoch) for epoch in range(config.epochs)} == {224}


@pytest.mark.parametrize(
    ("preset", "growth"),
    [
        ("ffcv-16ep", [(0, 160), (11, 160), (12, 192), (13, 192), (15, 192)]),
        ("ffcv-88ep", [(0, 160), (65, 160), (70, 160), (71, 192), (76, 192), (87, 192)]),
    ],
)
def test_a_presets_images_grow_as_in_ffcv_imagenet(preset: str, growth: list[tuple[int, int]]) -> None:
    config = configure(["--preset", preset])
    for epoch, size in growth:
        ramp = np.interp([epoch], [config.grow_from, config.grow_until], [160, 192])[0]
        assert config.resolution_at(epoch) == size == int(np.round(ramp / 32)) * 32
    assert config.epochs == int(preset.removeprefix("ffcv-").removesuffix("ep"))


def test_options_beside_a_preset_count_and_every_preset_is_offered() -> None:
    config = configure(["--preset=ffcv-40ep", "--epochs", "3", "--no-blurpool"])
    assert config == PRESETS["ffcv-40ep"].replace(epochs=3, blurpool=False)
    assert all(PRESETS[name].preset == name for name in PRESETS)


def test_blurpool_blurs_before_each_strided_convolution() -> None:
    torch.manual_seed(0)
    strided = nn.Conv2d(16, 8, 3, stride=2, padding=1, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.Sequential(strided, nn.Conv2d(8, 8, 3)))
    keys = {tuple(value.shape) for value in model.state_dict().values()}
    blur_strides(model)
    assert isinstance(model[0], nn.Conv2d)  # of three channels: not blurred, as in ffcv-imagenet
    x = torch.randn(2, 16, 9, 9)
    weights = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    blurred = torch.stack([functional.conv2d(c[:, None], weights[None, None], padding=1)[:, 0] for c in x.unbind(1)], 1)
    torch.testing.assert_close(model[1][0](x), strided(blurred))
    assert {tuple(value.shape) for value in model.state_dict().values()} == keys  # the kernel is not saved


def test_small_images_are_tested_at_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def loaders(*_: Any, resolution: Any, test_resolution: int) -> None:
        sizes.append(test_resolution)
        raise RunError("seen")

    monkeypatch.setattr(imagenet_ffcv, "open_loaders", loaders)
    small = ["--resolution", "32"]
    for arguments in (small, ["--preset", "ffcv-16ep"], [*small, "--test-resolution", "40"]):
        with pytest.raises(RunError, match="seen"):
            run(configure(arguments), 0, World(torch.device("cpu")))
    assert sizes == [32, 256, 40]
