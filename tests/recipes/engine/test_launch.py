from __future__ import annotations

import json

import pytest
import torch
from engine import Config, RunError, join, launch
from engine.launch import _sentence


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_one_device_needs_no_launch() -> None:
    launch(Config(device="cpu"))
    with join(Config(device="cpu")) as world:
        assert (world.rank, world.size, world.is_first, world.device) == (0, 1, True, torch.device("cpu"))
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert world.highest(3) == 3


def test_a_batch_that_the_devices_cannot_share_is_refused_before_anything_starts() -> None:
    with pytest.raises(RunError, match="a batch of 128 cannot be shared equally by 3 processes"):
        launch(Config(device="cpu", devices=3))


def test_so_it_is_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RunError, match="a batch of 128 cannot be shared equally by 3 processes"):
        launch(Config(device="cpu"))


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match="--devices 4, but torch sees 2 GPUs"):
        launch(Config(devices=4))


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="--device cuda, but torch sees no GPU: check the driver, or use --device cpu"):
        launch(Config(device="cuda"))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"message": "RunError: no data", "extraInfo": {}}, "no data"),
        (json.dumps({"message": {"message": "RunError: no data"}}), "no data"),
        ("Signal 9 (SIGKILL) received by PID 7", "Signal 9 (SIGKILL) received by PID 7"),
        ("", "a process ended with exit status 5"),
    ],
)
def test_what_a_worker_died_of_becomes_one_sentence(message: object, sentence: str) -> None:
    assert _sentence(message, 5) == sentence
