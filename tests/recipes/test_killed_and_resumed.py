"""The whole way: a real command with workers and dropout, killed in mid-epoch, ends with the bits of a whole one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import imagenet_ffcv
import numpy as np
import pytest
from engine.checkpoint import find, load_latest
from PIL import Image

from tests.recipes.engine.test_resume import assert_same

# imagenet_ffcv.py, with dropout before its classifier: torch's own generator then decides what is learnt.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(imagenet_ffcv.__file__).parent)!r})
import imagenet_ffcv
from engine import command_line
from engine.main import main
from torch import nn

def with_dropout(*arguments, **names):
    model = make_model(*arguments, **names)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    return model

make_model, imagenet_ffcv.make_model = imagenet_ffcv.make_model, with_dropout
if __name__ == "__main__":
    main(command_line(imagenet_ffcv.configure), imagenet_ffcv.run)
"""
SETTINGS = ["--loader", "torch", "--workers", "2", "--device", "cpu", "--devices", "1", "--model", "test_resnet"]
SETTINGS += ["--rate", "0.5", "--epochs", "3", "--warmup-epochs", "1", "--batch-size", "8", "--accumulate", "2"]
SETTINGS += ["--resolution", "32", "--test-resolution", "32", "--lr", "0.1", "--no-progress", "--resume"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 25), ("val", 4)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return root


def start(script: Path, data: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), *SETTINGS, "--data-dir", str(data), "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algorithm", ["rdp", "standard"])
def test_bit_by_bit(algorithm: str, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "with_dropout.py"
    script.write_text(PROGRAM)
    whole = start(script, data, tmp_path / "whole", "--algorithm", algorithm)
    assert whole.wait(300) == 0, whole.communicate()[0]
    for position in ("epoch-000-step-00003", "epoch-001-step-00005"):
        run = start(script, data, tmp_path / "cut", "--algorithm", algorithm, "--checkpoint-minutes", "1e-9")
        checkpoints, until = tmp_path / "cut" / "seed-0" / "checkpoints", time.monotonic() + 300
        while run.poll() is None and time.monotonic() < until:
            if any(path.name >= position for path in find(checkpoints)):
                break
            time.sleep(0.001)
        run.kill()
        said = run.communicate()[0]
        assert run.returncode == -9, said
        assert position <= find(checkpoints)[-1].name < position[:9] + "-step-00009", said  # in mid-epoch
    last = start(script, data, tmp_path / "cut", "--algorithm", algorithm)
    assert last.wait(300) == 0, last.communicate()[0]
    assert_same(*(load_latest(tmp_path / run / "seed-0" / "checkpoints") for run in ("whole", "cut")))
