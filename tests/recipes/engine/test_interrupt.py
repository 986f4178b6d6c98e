from __future__ import annotations

import os
import signal

import pytest
import torch
from engine.interrupt import SIGNALS, Action, Interrupts
from engine.launch import World

ALONE = World(torch.device("cpu"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_is_given_back_afterwards(number: signal.Signals) -> None:
    outside = signal.signal(number, signal.default_int_handler)  # whatever it is here: nohup ignores one
    try:
        with Interrupts(10, ALONE) as interrupts:
            assert interrupts.poll() is Action.GO_ON
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a terminal's Ctrl-C comes twice to a process of torchrun
            assert interrupts.poll() is Action.STOP
            assert interrupts.exit_status == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outside)


def test_a_checkpoint_is_due_once_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    interrupts = Interrupts(2, ALONE)
    actions = []
    for now in (0.0, 119.0, 120.0, 121.0, 239.0, 240.0):  # noqa: B007
        actions.append(interrupts.poll())
    assert actions == [Action.GO_ON, Action.GO_ON, Action.SAVE, Action.GO_ON, Action.GO_ON, Action.SAVE]


def test_a_signal_that_is_ignored_stays_so_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(10, ALONE) as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.poll() is Action.GO_ON
    finally:
        signal.signal(signal.SIGHUP, before)
