"""Options of a run that change its arithmetic or its length, each from one end to the other on tiny data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.schedule import learning_rate
from torch import nn

from tests.recipes.engine.tiny import final_state, tiny_config, train_tiny

RDP = {"algorithm": "rdp", "rate": 0.5}


def weights(out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The model after a run."""
    config = tiny_config(out, **settings)
    train_tiny(config)
    return final_state(config)["model"]


def test_equal_cost_buys_as_many_epochs_as_cheaper_steps_pay_for(tmp_path: Path) -> None:
    settings = RDP | {"mode": "batch", "epochs": 8}
    steps = train_tiny(tiny_config(tmp_path / "steps", **settings))
    cost = train_tiny(tiny_config(tmp_path / "cost", match="cost", **settings))
    assert steps["epochs"] == 8
    assert steps["relative_flops"] == cost["relative_flops"] < 0.9
    assert cost["epochs"] == round(8 / cost["relative_flops"])
    lines = [json.loads(line) for line in (tmp_path / "cost/seed-0/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == cost["epochs"]
    # The learning rate falls over all of them, not over those of the configuration.
    steps_in_all = 4 * cost["epochs"]
    assert lines[-1]["lr"] == learning_rate(steps_in_all - 1, steps_in_all, peak=0.05, warmup=4)


@pytest.mark.parametrize("algorithm", ["standard", "rdp"])
def test_a_compiled_model_learns_the_same(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:  # traces, generates no code
        traced.append(graph)
        return graph.forward

    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: original(model, backend=backend))
    torch._dynamo.reset()
    settings = RDP | {"algorithm": algorithm}
    compiled = weights(tmp_path / "compiled", compile=True, **settings)
    assert traced
    plain = weights(tmp_path / "plain", **settings)
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"channels_last": True}, 1e-4),  # sums in another order
        ({"amp": "bf16"}, 2e-2),
        ({"amp": "fp16"}, 5e-3),
        ({"clip_grad": 1e9}, 1e-4),
    ],
    ids=str,
)
def test_a_run_ends_near_the_plain_one(settings: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    plain = weights(tmp_path / "plain", epochs=2, **RDP)
    other = weights(tmp_path / "other", epochs=2, **(RDP | settings))
    assert all(value.dtype == plain[name].dtype and value.isfinite().all() for name, value in other.items())
    change = max(float((other[name] - value).abs().max()) for name, value in plain.items() if value.is_floating_point())
    assert change <= tolerance
    if "clip_grad" not in settings:
        assert change > 0  # it did something


def test_the_moving_average_is_tested_beside_the_model_and_saved(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ema=0.5, **RDP)
    result = train_tiny(config)
    assert {"top1", "ema_top1"} <= result.keys()
    state = final_state(config)
    assert state["ema"].keys() == {f"module.{name}" for name in state["model"]}
    assert not torch.equal(state["ema"]["module.head.weight"], state["model"]["head.weight"])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_is_the_one_asked_for(schedule: str, tmp_path: Path) -> None:
    train_tiny(tiny_config(tmp_path, schedule=schedule))
    lines = [json.loads(line) for line in (tmp_path / "seed-0/metrics.jsonl").read_text().splitlines()]
    expected = [learning_rate(4 * epoch + 3, 12, peak=0.05, warmup=4, shape=schedule) for epoch in range(3)]
    assert [line["lr"] for line in lines] == expected


def test_the_mirror_image_is_tested_too(tmp_path: Path) -> None:
    losses = []
    for name, flip in (("with", True), ("without", False)):
        train_tiny(tiny_config(tmp_path / name, test_flip=flip))
        losses.append(json.loads((tmp_path / name / "seed-0/metrics.jsonl").read_text().splitlines()[-1])["test_loss"])
    assert losses[0] != losses[1]
