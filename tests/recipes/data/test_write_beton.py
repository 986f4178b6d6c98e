"""`tools/write_beton.py` and `tools/benchmark_loaders.py` as a person runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data import beton
from data.datasets import read_arrays
from data.folder import read_folder

from tools import benchmark_loaders, write_beton

TOOLS = Path(__file__).parents[3] / "tools"


def test_as_a_program(tmp_path):
    program = [sys.executable, TOOLS / "write_beton.py", "mnist10k", "--out", tmp_path]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "mnist10k-train.beton: 8500 images" in result.stdout
    assert "100%" in result.stderr


def test_digits(tmp_path):
    write_beton.main(["mnist10k", "--out", str(tmp_path)])
    for split in ("train", "test"):
        file, arrays = beton.open_beton(tmp_path / f"mnist10k-{split}.beton"), read_arrays("mnist10k", split)
        assert file.labels.tolist() == arrays.labels.tolist()
        pixels = np.fromfile(file.path, np.uint8)
        row = file.table[-1]
        assert pixels[row["pointer"] :][: row["size"]].tobytes() == arrays.images[-1].tobytes()


def test_photographs(tmp_path, photographs):
    options = ["--data-dir", str(photographs), "--out", str(tmp_path), "--max-resolution", "48", "--jpeg-share", "0.5"]
    write_beton.main(["imagenet", *options, "--splits", "train"])
    file = beton.open_beton(tmp_path / "imagenet-train.beton")
    assert file.labels.tolist() == read_folder(photographs, "train").labels.tolist()
    assert file.heights.max() <= 48
    assert [path.name for path in tmp_path.iterdir()] == ["imagenet-train.beton"]
    options = ["--data-dir", str(photographs), "--out", str(tmp_path), "--shorter-side", "32", "--jpeg-share", "0"]
    write_beton.main(["imagenet", *options, "--splits", "test"])
    file = beton.open_beton(tmp_path / "imagenet-test.beton")
    assert set(np.minimum(file.heights, file.widths).tolist()) == {32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mnist", "--data-dir", "nowhere"],
            "error: train-images-idx3-ubyte(.gz) is neither in nowhere nor in nowhere/",
        ),
        (["imagenet", "--data-dir", "nowhere"], "error: there is no folder nowhere/train; --data-dir must hold train/"),
        (["mnist10k", "--page-size", "5"], "error: page_size must be a power of two from 2097152"),
    ],
)
def test_errors_are_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        write_beton.main(arguments)
    assert exit_.value.code.startswith(message)  # Python prints it and exits with 1
    assert "\n" not in exit_.value.code
    assert not any(tmp_path.rglob("*.beton*"))


@pytest.mark.timeout(300)
def test_benchmark_prints_a_table(capsys):
    benchmark_loaders.main(benchmark_loaders.Config(small_images=64, photographs=8, batch_size=8, rounds=1, workers=1))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    names = {(images.strip(), loader.strip()) for images, loader, _, _ in rows}
    assert {("32 x 32", "DataLoader + PIL"), ("32 x 32", "ours, in memory")} <= names
    assert {("JPEG to 224", "DataLoader + PIL"), ("JPEG to 224", "ours, no FFCV")} <= names
    assert all(float(rate.replace(",", "")) > 0 for _, _, rate, _ in rows)
