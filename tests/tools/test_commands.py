"""Every command answers `--help` at once: before it imports what takes seconds, and without doing anything."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    path
    for folder in ("recipes", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]
HEAVY = {"matplotlib", "rdp", "tensorboard", "timm", "torch", "torchvision", "transformers"}
"""Of what they import, what takes longer than a tenth of a second. It is counted, not timed."""

# Runs a command in this process and says on stderr what it has imported.
PROGRAM = f"""
import atexit, runpy, sys
atexit.register(lambda: print(sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ask(path: Path, *arguments: str, cwd: Path, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", program, str(path), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_is_answered_before_anything_heavy_is_imported_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    run = ask(path, "--help", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "[]\n")
    assert path.name in run.stdout.splitlines()[0]
    says = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert says in " ".join(run.stdout.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_a_mistake_in_the_command_line_is_told_as_fast(path: Path, tmp_path: Path) -> None:
    run = ask(path, "--no-such-option", cwd=tmp_path)
    assert run.returncode == 2
    assert "--help" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.endswith("[]\n")


NEEDED = {  # by the command lines of some
    "figures.py": ("compare", "."),
    "shallower.py": (".",),
}
WITHOUT_TORCH = {"benchmark_help.py", "study.py", "study_report.py", "table1.py", "write_beton.py"}
INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch" or name.partition(".")[0] in {"timm", "torchvision", "matplotlib"}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("path", [p for p in COMMANDS if p.name not in WITHOUT_TORCH], ids=lambda path: path.name)
def test_control_c_ends_the_imports_at_once_and_without_a_traceback(path: Path, tmp_path: Path) -> None:
    run = ask(path, *NEEDED.get(path.name, ()), cwd=tmp_path, program=INTERRUPTED)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")
    assert not list(tmp_path.iterdir())
