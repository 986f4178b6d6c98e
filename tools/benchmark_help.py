"""How long each command takes to answer `--help`, as a ratio to `import torch` in the same run.

    python tools/benchmark_help.py                          # a minute

CPU time of processes, so that it does not matter what else the machine does; each is the least of several, in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import project_paths  # noqa: F401
import tyro
from engine import explained

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Args:
    """Options."""

    repeat: int = 3
    """Rounds."""


def seconds(*arguments: str) -> float:
    """CPU time of Python with these arguments.

    Raises:
        SystemExit: it fails.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"python {' '.join(arguments)} ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime


def main(args: Args) -> None:
    """Measure and print."""
    if args.repeat < 1:
        raise SystemExit("--repeat must be at least 1")
    files = [path for folder in ("recipes", "tools") for path in sorted((ROOT / folder).glob("*.py"))]
    commands = [str(path.relative_to(ROOT)) for path in files if 'if __name__ == "__main__":' in path.read_text()]
    contenders = {"import torch": ("-c", "import torch")} | {name: (name, "--help") for name in commands}
    rounds = [{name: seconds(*arguments) for name, arguments in contenders.items()} for _ in range(args.repeat)]
    least = {name: min(each[name] for each in rounds) for name in contenders}
    print("| command | CPU seconds | of `import torch` |\n|---|---:|---:|")
    for name, value in least.items():
        print(f"| `{name}` | {value:.2f} | {value / least['import torch']:.2f} |")


if __name__ == "__main__":
    with explained():
        main(tyro.cli(Args, description=__doc__))
