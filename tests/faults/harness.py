"""Starts a real command, spoils something, and looks at how it ends and what is left of its work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoint import _NAME, find

from tests.faults.start import Forked, Process, by_shell

RECIPES = Path(__file__).parents[2] / "recipes"
PATIENCE = 240.0  # seconds for a command to get where the fault is injected, however loaded the machine is
LONGEST = 15.0  # seconds from the fault to the end of all processes
Inject = Callable[["Run"], None]


@dataclass
class Run:
    """A command that runs, and its results folder."""

    process: Process
    out: Path
    log: Path
    data: Path

    @property
    def folder(self) -> Path:
        """Of the one seed."""
        return self.out / "seed-0"

    def position(self) -> tuple[int, int]:
        """Epoch and step of the newest checkpoint; of spiral_mlp's one, when it was written."""
        with suppress(FileNotFoundError):  # the run has just removed an old one
            if paths := find(self.folder / "checkpoints"):
                match = _NAME.fullmatch(paths[-1].name)
                assert match is not None
                return int(match["epoch"]), int(match["step"])
            return 0, (self.out / "rdp" / "checkpoint.pt").stat().st_mtime_ns
        return (-1, 0)

    def children(self) -> list[int]:
        """Process numbers of what the command started, the oldest first."""
        return children(self.process.pid)

    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether something came true before the command ended."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.05)
        return condition()


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong."""

    name: str
    command: str  # a key of COMMANDS
    told: str = ""  # a pattern of the sentence; "" where nothing can or need be said
    status: int | None = None  # exit status; None: whatever, as of `kill -9`
    prepare: Callable[[Path, Path], None] | None = None  # spoils the results folder and the data before the start
    inject: Inject | None = None  # after a checkpoint was written; None: it happens at the start
    when: str = ""  # inject once this was printed, not after a checkpoint
    after: float | None = None  # or so many seconds after the start
    arguments: tuple[str, ...] = ()
    shell: str = '"$@"'  # how the command is started
    takes_away: bool = False  # the fault itself is that checkpoints are gone
    survives: bool = False  # the run goes on: it writes another checkpoint, and is then stopped by SIGTERM
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def piped(self) -> bool:
        """Whether the shell stays, with the command as its child."""
        return "|" in self.shell


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    fault: Fault
    seconds: float
    status: int | None
    lost: str
    problems: tuple[str, ...]

    @property
    def row(self) -> str:
        """Of the table."""
        end = "goes on" if self.fault.survives else "told" if self.fault.told else "ends"
        verdict = "; ".join(self.problems) or end
        return f"| {self.fault.name} | {self.fault.command} | {verdict} | {self.seconds:.1f} | {self.lost} |"


def children(parent: int) -> list[int]:
    """The processes that a process started, the oldest first."""
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(parent: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    return [pid for child in children(parent) for pid in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def try_fault(fault: Fault, command: list[str], out: Path, data: Path, start_seconds: float) -> Outcome:
    """Start the command, let the fault happen, and judge how it ends.

    Args:
        fault: which one.
        command: after the interpreter, without the results folder.
        out: the results folder, which may hold a run already.
        data: its data.
        start_seconds: how long a sound command takes to its first checkpoint here and now.
    """
    if fault.prepare is not None:
        fault.prepare(out, data)
    log = out.with_suffix(".log")
    environment = {"OMP_NUM_THREADS": "1"} | fault.environment
    arguments = [*command, "--out", str(out), *fault.arguments]
    if "--resume-from-out" in arguments:  # spiral_mlp's own way
        arguments = [command[0], "--resume", str(out)]
    process: Process
    if fault.shell == '"$@"' and fault.after is None and not fault.environment:
        process = Forked(arguments, log, environment)
    else:
        process = by_shell(fault.shell, arguments, log, environment)
    run = Run(process, out, log, data)
    started = time.monotonic()
    problems: list[str] = []
    known: list[int] = []
    first = run.position()
    try:
        if fault.after is not None:
            time.sleep(fault.after)
        elif fault.when:
            run.wait_for(lambda: fault.when in run.said())
        elif fault.inject is not None or fault.survives:
            run.wait_for(lambda: run.position() > first)
        known = descendants(process.pid)
        before = run.position() if fault.inject is not None or fault.survives else first
        if (fault.inject is not None or fault.survives) and process.poll() is not None:
            problems.append("ended before the fault")
        if fault.inject is not None:
            fault.inject(run)
            started = time.monotonic()
        if fault.survives:
            before = run.position()
            if not run.wait_for(lambda: run.position() > before):
                problems.append("does not go on")
            before = run.position()
            known = descendants(process.pid)
            started = time.monotonic()
            for pid in known if fault.piped else [process.pid]:
                with suppress(ProcessLookupError):  # said already: it does not go on
                    os.kill(pid, signal.SIGTERM)
        bound = LONGEST if fault.inject is not None or fault.survives else LONGEST + 2 * start_seconds
        try:
            process.wait(bound - (time.monotonic() - started))
            while any(map(is_alive, known)) and time.monotonic() - started < bound:
                time.sleep(0.02)
        except subprocess.TimeoutExpired:
            problems.append(f"HANGS over {bound:.0f} s")
        seconds = time.monotonic() - started
        if any(map(is_alive, known)):
            problems.append("leaves processes behind")
    finally:
        for pid in [process.pid, *known]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    problems += _judge(fault, run)
    after = run.position()
    lost = "what was removed" if fault.takes_away else "nothing" if after >= before else f"{before} -> {after}"
    if after < before and not fault.takes_away:
        problems.append("LOST WORK")
    return Outcome(fault, seconds, process.poll(), lost, tuple(problems))


def _judge(fault: Fault, run: Run) -> list[str]:
    said, problems = run.said(), []
    theirs = "torch.distributed.run" in fault.shell  # torchrun adds a traceback of its own to whatever was said
    if ("Traceback" in said and not theirs) or "Exception ignored" in said:
        problems.append("TRACEBACK")
    if fault.told:
        sentences = [line for line in said.splitlines() if re.search(fault.told, line)]
        if len(sentences) != 1:
            problems.append(f"said {len(sentences)} times")
    status = 143 if fault.survives and fault.status is None and not fault.piped else fault.status
    if status is not None and run.process.poll() != status:
        problems.append(f"exit status {run.process.poll()}, not {status}")
    return problems
