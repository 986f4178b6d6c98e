"""Starting a command: by a shell, or in a process that has imported already what it needs, which saves the seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

_one_at_a_time = threading.Lock()


class Process(Protocol):
    """A command that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; `subprocess.TimeoutExpired` if it does not come."""


class Forked:
    """A command in a fork of a process that imported torch and timm once for all of them."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        with _one_at_a_time:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["engine.train", "mnist", "spiral_mlp"])
            self._process = context.Process(target=_become, args=(command, str(log), environment))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (1e9 if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("command", timeout or 0)
            time.sleep(0.02)
        return status


def by_shell(shell: str, command: list[str], log: Path, environment: dict[str, str]) -> Process:
    """Start `"$@"` of a line of bash; without a pipe the shell becomes the command, so that signals reach it."""
    line = shell if "|" in shell or "exec" in shell else shell.replace('"$@"', 'exec "$@"')
    with log.open("wb") as file:
        return subprocess.Popen(
            ["bash", "-c", line, "-", sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            start_new_session=True,
        )


def _become(command: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
