"""Faults of every kind, injected into the real commands: none hangs, none loses work, each says what can be put right.

python -m pytest tests/faults -m faults -n 0 -s    # prints the table of docs/reliability.md; some minutes on two cores
FAULTS='memory|spiral' python -m pytest ...          # only those whose name or command matches
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.faults import FAULTS, ONE, SPIRAL, WORKERS, commands
from tests.faults.harness import Fault, Outcome, Run, try_fault
from tests.faults.start import Forked

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def make_images(root: Path) -> None:
    """Three classes of noise, 24 images each for training and 7 for testing."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (np.array(colour) + rng.normal(0, 30, (40, 48, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg")


def make_run(name: str, root: Path) -> float:
    """A run that was killed after its third checkpoint; the seconds to its first one."""
    out, data = root / name, root / f"{name} data"
    make_images(data)
    process = Forked([*commands(data)[name], "--out", str(out)], out.with_suffix(".log"), {"OMP_NUM_THREADS": "1"})
    run, started = Run(process, out, out.with_suffix(".log"), data), time.monotonic()
    if name == SPIRAL:
        assert run.wait_for((out / "rdp" / "checkpoint.pt").exists), run.said()
        time.sleep(0.1)
    else:
        assert run.wait_for(lambda: run.position() >= (0, 1)), run.said()
    seconds = time.monotonic() - started
    assert name == SPIRAL or run.wait_for(lambda: run.position() >= (0, 3)), run.said()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return seconds


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_no_fault_hangs_loses_work_or_ends_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(2) as two:
        starts = dict(
            zip((ONE, WORKERS, SPIRAL), two.map(make_run, (ONE, WORKERS, SPIRAL), [tmp_path] * 3), strict=True)
        )

        def attempt(number: int, fault: Fault) -> Outcome:
            here = tmp_path / ("größe" if "{unicode}" in fault.arguments else "") / str(number)
            data = here / "data"
            shutil.copytree(tmp_path / f"{WORKERS} data", data)
            if "{unicode}" in fault.arguments:
                fault = replace(fault, arguments=())
            prepared = fault.command in starts and (fault.inject is None) and (here / "out")
            if prepared:
                shutil.copytree(tmp_path / fault.command, prepared)
            outcome = try_fault(fault, commands(data)[fault.command], here / "out", data, max(starts.values()))
            with capsys.disabled():
                print(outcome.row, flush=True)
            return outcome

        with capsys.disabled():
            print("\n| fault | command | outcome | seconds | work lost |\n|---|---|---|---|---|")
        wanted = re.compile(os.environ.get("FAULTS", ""))
        chosen = [fault for fault in FAULTS if wanted.search(f"{fault.name} {fault.command}")]
        outcomes = list(two.map(attempt, range(len(chosen)), chosen))
    assert wanted.pattern or len(outcomes) >= 40
    logs = {
        outcome.fault.name: next(tmp_path.rglob(f"{number}/out.log")).read_text(errors="replace")[-2000:]
        for number, outcome in enumerate(outcomes)
        if outcome.problems
    }
    assert not logs, "\n\n".join(f"{name}:\n{log}" for name, log in logs.items())
