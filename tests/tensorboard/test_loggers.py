"""The functions of docs/your_loop.md against the real packages, offline: the same numbers and pictures arrive."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pil
from torch import nn

import rdp
from rdp.analysis import grid, spiral
from rdp.tensorboard import Image, Log, Panels

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "your_loop.md"


def documented(name: str, package: Any) -> Log:
    """A function of the page, as it stands there."""
    source = re.search(rf"^def {name}\(.*?(?=\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert source, f"{PAGE} has no {name}"
    names = {name.removeprefix("to_"): package}
    exec(source[0], names)
    return names[name]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def train(log: Log) -> tuple[dict[str, float], dict[str, Image]]:
    """Log a short training, and return the last numbers and pictures that were told."""
    numbers, images = {}, {}

    def both(step: int, of_step: Mapping[str, float], pictures: Mapping[str, Image]) -> None:
        log(step, of_step, pictures)
        numbers.update(of_step)
        images.update(pictures)

    torch.manual_seed(0)
    model, (points, labels) = Net(), spiral(32)
    handle = rdp.attach(model, 0.5, example_inputs=points)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    with Panels(handle, grid(8), both, grid_size=8, scalars_every=2, images_every=4) as panels:
        for step in range(6):
            loss = nn.functional.cross_entropy(model(points), labels)
            optimizer.zero_grad()
            loss.backward()
            panels.log(step, loss=loss)
            optimizer.step()
        panels.metrics(6, top1=75.0)
    assert {"train/loss", "test/top1", "drop/loss"} <= set(numbers)
    assert {"features/nodes", "features/similarity"} <= set(images)
    return numbers, images


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="no wandb: pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="rdp")
    numbers, images = train(documented("to_wandb", wandb))
    run.log({"end": 1}, step=7)  # a step is in the summary when the next one begins
    files, summary = Path(run.dir), run.summary
    for tag, number in numbers.items():
        assert summary[tag] == pytest.approx(number), tag
    for tag, image in images.items():
        kept = pil.open(files / summary[tag]["path"]).convert("RGB")
        assert np.array_equal(np.asarray(kept), image), tag
    run.finish()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="no mlflow: pip install mlflow-skinny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones want a database
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        numbers, images = train(documented("to_mlflow", mlflow))
    client = mlflow.MlflowClient()
    client_run = client.get_run(run.info.run_id)
    for tag, number in numbers.items():
        assert client_run.data.metrics[tag] == pytest.approx(number), tag
    kept = [Path(path) for path in (tmp_path / "runs").rglob("*.png")]
    for tag, image in images.items():
        sizes = [pil.open(path).size for path in kept if path.name.startswith(tag.replace("/", "_"))]
        assert (image.shape[1], image.shape[0]) in sizes, tag
