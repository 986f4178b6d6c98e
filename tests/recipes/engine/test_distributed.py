"""Two CPU processes (gloo) train together: replicas stay bit-identical, and resuming is as exact as with one."""

from __future__ import annotations

import functools
import signal
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.engine.test_resume import assert_same
from tests.recipes.engine.tiny import final_state, run_rank, tiny_config

VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "droppath-batch": {"algorithm": "droppath", "mode": "batch", "rate": 0.5},
    "rdp-batch": {"algorithm": "rdp", "mode": "batch", "rate": 0.5},
    "rdp-accumulate-ema": {"algorithm": "rdp", "rate": 0.5, "accumulate": 2, "ema": 0.9, "batch_size": 32},
    "rdp-row-few": {"algorithm": "rdp", "rate": 0.5, "batch_size": 4},  # often no row of a rank, or of any, is live
    "rdp-fsdp": {"algorithm": "rdp", "rate": 0.5, "fsdp": True},
}


Together = Callable[..., list[int | None]]


@pytest.fixture
def run_together(processes: ForkServerContext) -> Together:
    """A function that trains in two processes and returns their exit codes."""
    return functools.partial(_run_together, processes)


def _run_together(
    processes: ForkServerContext, out: Path, settings: dict[str, Any], cut: dict[int, str] | None = None
) -> list[int | None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        processes.Process(target=run_rank, args=(rank, 2, port, str(out), settings, cut or {})) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in hung:
        ranks[rank].kill()
    assert not hung, f"ranks {hung} hang"
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_are_bit_identical_and_a_cut_run_ends_like_a_whole_one(
    variant: str, tmp_path: Path, run_together: Together
) -> None:
    settings = VARIANTS[variant] | {"checkpoint_minutes": 1e-9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_together(whole, settings) == [0, 0]
    state = final_state(tiny_config(whole, **settings))
    fingerprints = [process["parameters"] for process in state["processes"]]
    assert len(fingerprints) == 2
    assert fingerprints[0] == fingerprints[1]
    assert run_together(cut, settings, cut={0: "crash", 1: "crash"}) == [3, 3]
    assert final_state(tiny_config(cut, **settings))["epoch"] == 1
    assert run_together(cut, settings) == [0, 0]
    assert_same(state, final_state(tiny_config(cut, **settings)))


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path, run_together: Together) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_together(whole, {}) == [0, 0]
    assert run_together(cut, {}, cut={1: "signal"}) == [128 + signal.SIGTERM] * 2
    assert final_state(tiny_config(cut))["step"] == 2
    assert run_together(cut, {}) == [0, 0]
    assert_same(final_state(tiny_config(whole)), final_state(tiny_config(cut)))
