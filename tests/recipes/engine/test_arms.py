"""What distinguishes the arms of a comparison: when the algorithm is on, what learns in FREEZE, how long the run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Config, RunError, cost
from engine.cost import cost_of, keep, matched_epochs, relative_flops
from engine.examine import Network, examine
from engine.launch import World
from engine.model import attach
from engine.outside import slow_outside
from engine.schedule import learning_rate, unsqueezed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

import rdp
from tests.recipes.engine.tiny import TinyData, TinyNet, tiny_config, train_tiny

RDP = {"algorithm": "rdp", "rate": 0.5, "warmup_epochs": 0}
ALONE = World(torch.device("cpu"))


def losses(out: Path, **settings: Any) -> list[float]:
    """The training loss of each of three epochs."""
    train_tiny(tiny_config(out, **settings))
    return [json.loads(line)["train_loss"] for line in (out / "seed-0" / "metrics.jsonl").read_text().splitlines()]


def test_outside_of_start_and_stop_training_is_plain(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", warmup_epochs=0)
    always = losses(tmp_path / "always", **RDP)
    late = losses(tmp_path / "late", start=0.34, **RDP)
    early = losses(tmp_path / "early", stop=0.34, **RDP)
    assert late[0] == plain[0] != always[0]
    assert early[0] == always[0]
    assert len({plain[2], always[2], late[2], early[2]}) == 4
    with pytest.raises(RunError, match="leave none of the 12 steps between"):
        train_tiny(tiny_config(tmp_path / "never", start=0.999, **RDP))


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [0.4] * 8),
        ({"start": 0.25, "stop": 0.75}, [0, 0, *[0.4] * 4, 0, 0]),
        ({"start": 0.25, "stop": 0.75, "rate_schedule": "rising"}, [0, 0, 0, 0, 0.2, 0.2, 0.4, 0.4]),
        ({"start": 0.25, "stop": 0.75, "rate_schedule": "falling"}, [0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0, 0]),
    ],
)
def test_rates_follow_their_schedule_cycle_by_cycle(
    tmp_path: Path, settings: dict[str, Any], rates: list[float]
) -> None:
    config = tiny_config(tmp_path, **(RDP | {"rate": 0.4, "decay": "constant"} | settings))
    images, _ = next(TinyData(1, 4).epoch(0))
    handle = attach(TinyNet(), config, seed=0, example=images, steps=8)
    assert handle is not None
    found = []
    for _ in range(8):
        found.append(handle.rates[-1])
        handle.advance()
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: AdamW(p, 0.1)])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_what_lies_in_no_branch_learns_less_in_freeze(make: Any, factor: float) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    images, labels = next(TinyData(1, 8).epoch(0))
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=images)
    inner = make(model.parameters())
    slow_outside(inner, handle, factor)
    optimizer = handle.wrap(inner)
    outside = [model.stem.weight, model.head.weight, model.head.bias]
    for step in range(6):
        phase = handle.phase
        before = [p.clone() for p in model.parameters()]
        states = [{k: torch.as_tensor(v).clone() for k, v in inner.state[p].items() if v is not None} for p in outside]
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        assert all(p.grad is not None for p in outside)  # shown again
        optimizer.zero_grad()
        moved = {id(p) for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)}
        still = phase is rdp.Phase.FREEZE and factor == 0
        assert all((id(p) in moved) != still for p in outside), step
        assert any(id(p) in moved for p in model.blocks.parameters()), step
        if still:
            kept = zip(outside, states, strict=True)
            assert all(torch.equal(torch.as_tensor(inner.state[p][k]), v) for p, s in kept for k, v in s.items())
        assert {group["lr"] for group in inner.param_groups} == {0.1}


def test_the_factor_is_that_of_the_learning_rate() -> None:
    def moves(factor: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = TinyNet()
        images, labels = next(TinyData(1, 8).epoch(0))
        handle = rdp.attach(model, 0.5, phases=(rdp.Phase.DROP, rdp.Phase.FREEZE), example_inputs=images)
        inner = SGD(model.parameters(), 0.1)
        slow_outside(inner, handle, factor)
        optimizer = handle.wrap(inner)
        for _ in range(2):
            optimizer.zero_grad()
            before = model.head.weight.detach().clone()
            model.dropout.p = 0.0
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return model.head.weight.detach() - before

    torch.testing.assert_close(moves(0.25), moves(1.0) / 4)


@given(start=st.floats(0, 1), to=st.floats(0.01, 1), whole=st.integers(2, 400))
def test_a_squeezed_schedule_is_the_whole_one_and_then_passes_faster(start: float, to: float, whole: int) -> None:
    steps = max(1, round(whole * (start + to * (1 - start))))
    places = [unsqueezed(step, steps, whole, start) for step in range(steps)]
    assert all(place == step for step, place in enumerate(places) if step < start * whole)
    assert places == sorted(places)
    assert places[-1] <= whole - 1 + 1e-9 * whole or steps > start * whole
    assert unsqueezed(steps, steps, whole, start) == pytest.approx(whole) or steps <= start * whole


def test_a_squeezed_run_ends_with_the_learning_rate_near_zero(tmp_path: Path) -> None:
    squeezed = {"epochs": 10, "squeeze_from": 0.5, "squeeze_to": 0.6, "warmup_epochs": 0}
    result = train_tiny(tiny_config(tmp_path, **squeezed))
    assert (result["epochs"], result["steps"]) == (8, 32)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert rates[:5] == [learning_rate(4 * epoch + 3, 40, peak=0.05) for epoch in range(5)]
    assert rates[-1] == pytest.approx(learning_rate(40 - 20 / 12, 40, peak=0.05))  # not 2e-7 of step 31 of 40
    assert matched_epochs(Config(**squeezed), 0.5) == 8  # type: ignore[arg-type]


def test_tests_come_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    result = train_tiny(tiny_config(tmp_path, epochs=5, test_every=2))
    lines = [json.loads(line) for line in (tmp_path / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "top1" in line] == [1, 3, 4]
    assert (result["top1"], result["test_loss"]) == (lines[-1]["top1"], lines[-1]["test_loss"])


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"algorithm": "standard"}, "standard"),
        ({"epochs": 20}, "rdp-row-0.1,epochs=20"),
        ({"start": 0.8, "limit": 500}, "rdp-row-0.1,start=0.8,limit=500"),
        ({"rate_schedule": "rising"}, "rdp-row-0.1,rate_schedule=rising"),
        ({"phases": ("drop", "freeze", "freeze")}, "rdp-row-0.1,phases=drop-freeze-freeze"),
        ({"seed": 3, "data_dir": Path("x"), "workers": 2}, "rdp-row-0.1"),
    ],
)
def test_a_results_folder_is_named_by_all_that_distinguishes_it(settings: dict[str, Any], label: str) -> None:
    assert Config(**settings).label == label
    assert Config(**settings).folder == Path("results", "mnist10k", "resnet50", label)


def test_a_long_name_still_distinguishes_and_is_one_a_file_system_takes() -> None:
    long = {"model_kwargs": tuple(f"argument_{i}=1234567890" for i in range(20))}
    labels = {Config(epochs=epochs, **long).label for epochs in (10, 20, 30)}
    assert len(labels) == 3
    assert max(map(len, labels)) < 255


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.5, "stop": 0.5}, "--start 0.5 is not before --stop 0.5"),
        ({"algorithm": "droppath", "phases": ("drop",)}, "--phases does nothing with --algorithm droppath"),
        ({"algorithm": "standard", "decay": "constant"}, "--decay does nothing with --algorithm standard"),
        ({"algorithm": "droppath", "freeze_outside": 0.0}, "--freeze-outside does nothing with --algorithm droppath"),
        ({"stem_stride": 2}, "--stem-stride is the stride of --small-stem"),
        ({"match": "cost", "squeeze_from": 0.5, "squeeze_to": 0.5}, "and so does --match cost"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Config(**settings)


def test_a_cost_is_counted_once_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(cost, "relative_flops", lambda *rest: counted.append(1) or relative_flops(*rest))
    images, labels = next(TinyData(1, 4).epoch(0))

    def found(**settings: Any) -> cost.Cost:
        config = tiny_config(tmp_path, count_steps=4, **(RDP | settings))
        return cost_of(TinyNet(), config, images, labels, _none, ALONE)

    first = found()
    keep(first, tiny_config(tmp_path, count_steps=4, **RDP), images)
    assert found() == first
    assert len(counted) == 1
    half = found(start=0.25, stop=0.75)
    assert half.relative_flops == pytest.approx(1 - (1 - first.relative_flops) / 2)
    longer = found(start=0.25, stop=0.75, rate_schedule="rising")
    assert longer.relative_flops == pytest.approx(1 - (1 - first.relative_flops) * 3 / 4)
    assert half.image_flops == first.image_flops
    (tmp_path / "cost.json").write_text("{")
    assert found() == first
    assert len(counted) == 4


def _none() -> Any:
    return torch.enable_grad()


def test_phases_are_counted_equally_often() -> None:
    images, labels = next(TinyData(1, 2).epoch(0))
    settings: dict[str, Any] = {"rate": 0.5, "mode": "batch", "count_steps": 8, "decay": "constant"}
    one = relative_flops(TinyNet(), Config(phases=("drop", "plain", "plain"), **settings), images, labels)
    two = relative_flops(
        TinyNet(), Config(phases=("drop", "plain", "plain", "plain", "plain"), **settings), images, labels
    )
    assert one < two < 1


def test_a_run_is_examined_at_its_end(tmp_path: Path) -> None:
    result = train_tiny(tiny_config(tmp_path, examine=True, **RDP))
    assert 0 <= result["train_top1"] <= 100
    assert 0 <= result["reused"] + result["recreated"] <= 1
    assert {"bn_top1", "bn_loss"} <= result.keys()
    assert result["data"]["training"]["samples"] == 64


def test_statistics_are_taken_anew_from_the_plain_network() -> None:
    torch.manual_seed(0)
    model, data = TinyNet(), TinyData(2, 8)
    model.dropout.p = 0.0
    images = torch.cat([images for images, _ in data.epoch(5)])
    handle = rdp.attach(model, 0.9, decay="constant", example_inputs=images[:2])
    config, cpu = tiny_config(Path("unused"), examine=True), torch.device("cpu")
    examine(Network(model, cpu, _none), handle, data, data, config=config, epochs=5, folder=None)
    with torch.no_grad():
        mean = torch.stack([model.blocks[0].conv(model.stem(part)).mean((0, 2, 3)) for part in images.split(8)]).mean(0)
    torch.testing.assert_close(model.blocks[0].bn.running_mean, mean)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), Residual(), nn.Linear(36, 4))
    found = examine(Network(linear, cpu, _none), None, data, data, config=config, epochs=5, folder=None)
    assert not any(name.startswith("bn_") for name in found)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(36, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)
