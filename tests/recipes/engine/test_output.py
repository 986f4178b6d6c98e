"""Printing never ends a run, and leaves nothing that Python stumbles over when it exits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from engine.output import best_effort_output

ENGINE = Path(__file__).parents[3] / "recipes" / "engine"
# Of the module alone: importing the engine takes seconds.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ENGINE)!r})
from output import best_effort_output
with best_effort_output():
    for _ in range(3):
        print("caf\\u00e9 \\udcff", "x" * 10000, flush=True)
        print("unflushed")
        print("to stderr", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        file.write("reached")
"""


@pytest.mark.parametrize("coding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    "where", [">/dev/full 2>/dev/full", ">&- 2>&-", "| true", "<&- >/dev/null 2>&-", "> /dev/null"]
)
def test_whatever_the_output_is(where: str, coding: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = f"set -o pipefail; {sys.executable} {script} {tmp_path / 'done'} {where}"
    environment = os.environ | {"PYTHONIOENCODING": coding}
    run = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr.replace("to stderr\n", "")) == (0, "")
    assert (tmp_path / "done").read_text() == "reached"  # and not what was printed, under the number of a closed file


def test_what_can_be_written_is_and_the_streams_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with best_effort_output():
        print("out")
        print("err", file=sys.stderr)
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out\n", "err\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("error", "printed"), [(OSError(28, "full"), False), (ValueError("a mistake"), True)])
def test_a_thread_that_cannot_write_is_silent_and_a_mistake_is_not(
    error: Exception, printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with best_effort_output():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert ("Traceback" in capsys.readouterr().err) == printed
    assert threading.excepthook is threading.__excepthook__
