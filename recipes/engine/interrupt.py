"""When to write a checkpoint between epochs: every N minutes, and on a signal before stopping.

Ctrl-C is SIGINT; schedulers send SIGTERM, or SIGUSR1 some time before; a terminal that is closed sends SIGHUP.

with Interrupts(minutes=10, world=world) as interrupts:
    for batch in batches:
        ...
        match interrupts.poll(): ...
"""

from __future__ import annotations

import enum
import signal
import time
from types import FrameType, TracebackType
from typing import Self

from engine.launch import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Action(enum.IntEnum):
    """What to do before the next batch; the higher one wins when processes disagree."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class Interrupts:
    """Collects signals and the clock, and lets all processes agree on what follows."""

    def __init__(self, minutes: float, world: World) -> None:
        """Watch from the moment that the context is entered.

        Args:
            minutes: time between two checkpoints.
            world: the processes that have to agree.
        """
        self._seconds = minutes * 60
        self._world = world
        self._saved_at = time.monotonic()
        self._handlers: dict[signal.Signals, object] = {}
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        """Take over the signals: from now on they ask for a stop at the next batch."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell that put the run into the background
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def poll(self) -> Action:
        """What to do now: the same answer in every process. Call it equally often in each."""
        action = Action.GO_ON
        if self._world.is_first and time.monotonic() - self._saved_at >= self._seconds:
            action = Action.SAVE
        if self.signal is not None:
            action = Action.STOP
        action = Action(self._world.highest(action))
        if action is not Action.GO_ON:
            self._saved_at = time.monotonic()
        return action

    @property
    def exit_status(self) -> int:
        """The shell's custom for a process that a signal ended: 128 + its number."""
        return 128 + (self.signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Repeats are normal: a terminal's Ctrl-C reaches every process, and torchrun forwards it once more.
        self.signal = self.signal or signal.Signals(number)
