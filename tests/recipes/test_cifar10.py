"""The CIFAR-10 recipe on a stand-in in CIFAR-10's own file format: colour patches whose class is their colour."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import cifar10
import numpy as np
import pytest
from engine import command_line
from engine.main import main
from PIL import Image


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's folder `cifar-10-batches-py`, with 20 images in each of its six files."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(20) % 10
        colours = np.stack([labels * 25, 250 - labels * 25, labels % 2 * 250], axis=1)
        pixels = np.repeat(colours, 1024, axis=1) + rng.integers(-5, 6, (20, 3072))
        content = {"data": pixels.clip(0, 255).astype(np.uint8), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return root


def test_the_defaults_are_the_papers() -> None:
    config = cifar10.configure([])
    assert (config.model, config.batch_size, config.seeds, config.rate, config.small_stem) == (
        ("resnet50", 128, 5, 0.1, False)
    )


@pytest.mark.parametrize("stem", [pytest.param([], marks=pytest.mark.slow), ["--small-stem"]])
def test_it_trains_and_tests(stem: list[str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data-dir", str(data_dir), "--out", str(tmp_path), "--model", "resnet10t", "--seeds", "1", *stem]
    arguments += ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "20", "--device", "cpu", "--no-progress"]
    arguments += ["--count-steps", "2"]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)  # it is a stand-in
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *arguments])
    main(command_line(cifar10.configure), cifar10.run)
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert (result["dataset"], result["algorithm"], result["steps"]) == ("cifar10", "rdp", 10)
    assert 0 <= result["top1"] <= result["top5"] <= 100


def test_missing_data_is_one_sentence_that_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none, out = tmp_path / "none", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["cifar10.py", "--data-dir", str(none), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        main(command_line(cifar10.configure), cifar10.run)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "--download" in said
    assert not out.exists()


@pytest.mark.parametrize("algorithm", ["standard", "droppath", "rdp"])
def test_quick_trains_on_class_folders(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    arguments = ["--quick", "--data-dir", str(tmp_path / "images"), "--algorithm", algorithm, "--limit", "20"]
    arguments += ["--limit-test", "20", "--epochs", "2", "--batch-size", "10", "--device", "cpu", "--no-progress"]
    arguments += ["--count-steps", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *arguments])
    main(command_line(cifar10.configure), cifar10.run)
    (result,) = (tmp_path / "results" / "cifar10" / "resnet18").rglob("result.json")
    assert json.loads(result.read_text())["steps"] == 4
    assert result.parts[-3].startswith(("standard,", f"{algorithm}-row-0.1,"))
