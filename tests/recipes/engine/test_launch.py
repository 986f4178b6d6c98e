from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine import Config, RunError
from engine.launch import _lateness, _sentence, join, launch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


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


def set_environment(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    given = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (given | changed).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (dict.fromkeys(["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]), "RANK, LOCAL_RANK, .* are not: start"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is set and MASTER_PORT is not: start the run with torchrun, or unset"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE must be a number, not 'many'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not"),
        ({"RANK": "-1"}, "RANK must be a number, not '-1'"),
        ({"RANK": "3"}, "RANK 3 is not below WORLD_SIZE 3"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_named(
    changed: dict[str, str | None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, **changed)
    with pytest.raises(RunError, match=sentence):
        launch(Config(device="cpu", batch_size=12))


def test_devices_that_torchrun_was_not_told_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, WORLD_SIZE="1")
    with pytest.raises(RunError, match="--devices 2, but torchrun has started 1 process: give torchrun --nproc-per-n"):
        launch(Config(device="cpu", devices=2))
    set_environment(monkeypatch, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    launch(Config(device="cpu", devices=2))  # two machines


def test_that_another_process_ended_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, WORLD_SIZE="1")
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    for error in (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), dist.DistError("gone")):
        with (
            pytest.raises(RunError, match=r"another process of this run has ended; .* go on with --resume"),
            join(Config(device="cpu")),
        ):
            raise error
    with pytest.raises(RuntimeError, match="a mistake of ours"), join(Config(device="cpu")):
        raise RuntimeError("a mistake of ours")


def test_the_cause_is_told_and_not_what_followed_from_it(tmp_path: Path) -> None:
    def failure(rank: int, exitcode: int, message: str | None = None) -> ProcessFailure:
        file = tmp_path / f"{rank}.json"
        if message is not None:
            file.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "5"}}}))
        return ProcessFailure(rank, 100 + rank, exitcode, str(file))

    lost = "RunError: another process of this run has ended; what was saved is untouched: go on with --resume"
    killed = failure(0, -9)
    told = failure(1, 1, "RunError: a disk is full")
    followed = failure(2, 1, lost)
    stopped = failure(3, -15)
    traceback = failure(4, 1)
    assert min([stopped, followed, killed], key=_lateness) is killed
    assert min([followed, told, stopped], key=_lateness) is told
    assert min([followed, traceback, stopped], key=_lateness) is traceback


def test_so_it_is_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
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
        ("To enable traceback see: https://pytorch.org", "a process ended with exit status 5"),
        ("", "a process ended with exit status 5"),
    ],
)
def test_what_a_worker_died_of_becomes_one_sentence(message: object, sentence: str) -> None:
    assert _sentence(message, 5) == sentence


def test_a_process_that_was_killed_is_told_as_such() -> None:
    said = _sentence("Signal 9 (SIGKILL) received by PID 7", -9)
    assert said.startswith("a process of the run was killed (SIGKILL, as the system does when memory runs out); ")
    assert _sentence("Signal 11 (SIGSEGV) received by PID 7", -11).startswith(
        "a process of the run was killed (SIGSEGV)"
    )
