"""The law of resuming: wherever a run is cut, it ends with the very bits of the run that was never cut."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Config, RunError, records
from engine.checkpoint import find
from engine.records import Records

from tests.recipes.engine.tiny import Crash, TinyData, final_state, run_in_process, tiny_config, train_tiny

EACH_STEP = 1e-9  # minutes between checkpoints: one after every step

VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "droppath": {"algorithm": "droppath"},
    "rdp-row": {"algorithm": "rdp", "rate": 0.5},
    "rdp-batch": {"algorithm": "rdp", "mode": "batch", "rate": 0.5},
    "accumulate": {"algorithm": "rdp", "rate": 0.5, "accumulate": 2},
    "adamw-ema-clip": {"algorithm": "rdp", "rate": 0.5, "optimizer": "adamw", "ema": 0.9, "clip_grad": 1.0},
    "bf16": {"amp": "bf16"},
    "late": {"algorithm": "rdp", "rate": 0.5, "start": 0.4, "stop": 0.9, "test_every": 2},
    "outside": {"algorithm": "rdp", "rate": 0.5, "freeze_outside": 0.0, "phases": ("drop", "freeze", "freeze")},
}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit-equality of everything in two checkpoints but the times."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "epoch_seconds", "train_seconds", "images_per_second"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("variant", "every_step"), [*((name, True) for name in VARIANTS), ("standard", False), ("rdp-row", False)]
)
def test_a_run_cut_anywhere_ends_like_one_that_was_not(variant: str, every_step: bool, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    whole = tiny_config(tmp_path / "whole", **settings)
    expected = train_tiny(whole)
    cut = tiny_config(tmp_path / "cut", checkpoint_minutes=EACH_STEP if every_step else 10.0, **settings)
    for at in [(0, 2), (1, 0), (2, 1)]:
        with pytest.raises(Crash):
            train_tiny(cut, at=at)
    result = train_tiny(cut)
    assert_same(final_state(whole), final_state(cut))
    assert_same(expected, result)
    lines = [json.loads(line) for line in (cut.folder / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]


def test_the_law_can_fail(tmp_path: Path) -> None:
    one, other = tiny_config(tmp_path / "one"), tiny_config(tmp_path / "other", lr=0.0500001)
    train_tiny(one)
    train_tiny(other)
    with pytest.raises(AssertionError):
        assert_same(final_state(one), final_state(other))


def test_a_damaged_newest_checkpoint_only_costs_the_steps_since_the_one_before(tmp_path: Path) -> None:
    whole, cut = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "cut")
    train_tiny(whole)
    with pytest.raises(Crash):
        train_tiny(cut, at=(2, 1))
    newest = find(cut.folder / "seed-0" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged checkpoint .*checksum"):
        train_tiny(cut)
    assert_same(final_state(whole), final_state(cut))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    whole, cut = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "cut")
    train_tiny(whole)
    with pytest.raises(SystemExit) as stopped:
        train_tiny(cut, at=(1, 1), do=lambda: os.kill(os.getpid(), number))
    assert stopped.value.code == 128 + number
    assert (final_state(cut)["epoch"], final_state(cut)["step"]) == (1, 2)  # the step that was begun is done
    train_tiny(cut)
    assert_same(final_state(whole), final_state(cut))


def test_a_full_disk_ends_in_one_sentence_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "cut")
    train_tiny(whole)
    with monkeypatch.context() as full:

        def fsync(descriptor: int) -> None:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if is_file and list(cut.folder.rglob("epoch-001-*.pt")):  # the first epoch still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "fsync", fsync)
        with pytest.raises(RunError, match="No space left on device; what was saved before is untouched"):
            train_tiny(cut)
    assert not list(cut.folder.rglob(".*.tmp"))
    assert final_state(cut)["epoch"] == 1
    train_tiny(cut)
    assert_same(final_state(whole), final_state(cut))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twenty_times_at_random_moments(variant: str, tmp_path: Path, processes: ForkServerContext) -> None:
    settings = VARIANTS[variant] | {"epochs": 24, "checkpoint_minutes": EACH_STEP}
    whole, cut = tiny_config(tmp_path / "whole", **settings), tiny_config(tmp_path / "cut", **settings)
    train_tiny(whole)
    rng = random.Random(0)

    def start() -> BaseProcess:
        process = processes.Process(target=run_in_process, args=(str(cut.out), settings))
        process.start()
        return process

    kills: list[str] = []
    while len(kills) < 20:
        process = start()
        for _ in range(rng.randint(0, 5)):  # steps that it may do, however slow the machine is
            before = newest(cut)
            while process.is_alive() and newest(cut) == before:
                time.sleep(1e-3)
        process.join(rng.uniform(0, 0.05))  # then a moment: within a step, or within the writing of a checkpoint
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills.append(newest(cut))
        else:
            assert process.exitcode == 0
            shutil.rmtree(cut.folder)  # finished before it was killed often enough: once more
    assert len(set(kills)) > 10  # it was killed while it worked, not before
    last = start()
    last.join()
    assert last.exitcode == 0
    assert_same(final_state(whole), final_state(cut))


def newest(config: Config) -> str:
    """The name of a run's last checkpoint, if it has one."""
    while True:
        try:
            return next((path.name for path in reversed(find(config.folder / "seed-0" / "checkpoints"))), "")
        except FileNotFoundError:  # the run has just removed an old one
            continue


def test_what_is_told_of_an_epoch_is_saved_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    saved = []

    def tell(records: Records, epochs: int) -> None:
        saved.append(final_state(config)["history"])
        assert saved[-1] == records.history

    monkeypatch.setattr(Records, "tell", tell)
    train_tiny(config)
    assert [len(history) for history in saved] == [1, 2, 3]


def test_records_that_cannot_be_written_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = tiny_config(tmp_path)
    monkeypatch.setattr(records, "write_atomically", full)
    result = train_tiny(config)
    assert final_state(config)["history"][-1]["top1"] == result["top1"]
    assert "No space left on device; the run goes on" in capsys.readouterr().out


def test_a_folder_that_is_removed_while_the_run_goes_on_is_one_sentence(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "out")
    with pytest.raises(RunError, match=f"{config.folder}/seed-0 was removed or replaced while the run went on"):
        train_tiny(config, at=(1, 0), do=lambda: shutil.rmtree(config.folder))
    assert not config.folder.exists()


def cut_run(out: Path, **settings: Any) -> Config:
    config = tiny_config(out, **settings)
    with pytest.raises(Crash):
        train_tiny(config, at=(2, 0))
    return config


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("listing", "dots", "training listing: stripes -> dots; test listing: stripes -> dots; give it back what"),
        (
            "kind",
            "ffcv",
            "training loader: memory -> ffcv; test loader: memory -> ffcv; give --loader torch, or choose",
        ),
    ],
)
def test_other_data_is_refused_naming_it(
    name: str, value: object, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cut_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(TinyData, name, value)
    with pytest.raises(RunError, match=f"seed-0 was started with other data, so --resume is refused: {sentence}"):
        train_tiny(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_the_loader_that_it_had_however_that_is_asked_for(tmp_path: Path) -> None:
    whole = tiny_config(tmp_path / "whole")
    train_tiny(whole)
    config = cut_run(tmp_path / "cut")
    assert train_tiny(config.replace(loader="torch"))["loader"] == "memory"
    assert_same(final_state(whole), final_state(config))


def test_other_settings_are_refused_though_their_file_is_gone(tmp_path: Path) -> None:
    config = cut_run(tmp_path)
    (config.folder / "seed-0" / "config.json").unlink()
    with pytest.raises(RunError, match=r"with other settings, so --resume is refused: lr: 0\.05 -> 0\.3$"):
        train_tiny(tiny_config(tmp_path, lr=0.3))
    with pytest.raises(RunError, match="already holds a run"):
        train_tiny(config.replace(resume=False))
    train_tiny(config)
    assert (config.folder / "seed-0" / "config.json").exists()


def test_a_run_that_diverges_keeps_the_checkpoints_before(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, lr=1e30, checkpoint_minutes=EACH_STEP)
    with pytest.raises(RunError, match=r"the training loss of epoch 1 is (nan|inf)"):
        train_tiny(config)
    saved = [torch.load(path, weights_only=True) for path in find(config.folder / "seed-0" / "checkpoints")]
    assert saved
    assert all(state["processes"][0]["loss_sum"].isfinite() for state in saved)
