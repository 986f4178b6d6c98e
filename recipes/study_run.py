"""A run of recipes/study.py: its command, its process, and the record that it leaves."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.lifetime import die_with
from study_arms import LESIONS, Arm, Setting, options

HERE = Path(__file__).resolve().parent
PLACES = ("data_dir", "out")  # settings that say where a run was, and not what


class StudyError(RuntimeError):
    """The study cannot start or go on; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Run:
    """One arm, one seed."""

    setting: Setting
    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.setting.name}/{self.arm.name}/seed-{self.seed}"

    def command(self) -> list[str]:
        """What computes it, but for where it runs."""
        seed = ["--seeds", "1", "--seed", str(self.seed)]
        if self.seed == 0 and self.arm.name in LESIONS:  # minutes each
            seed.append("--lesions")
        return [f"recipes/{self.setting.recipe}", *options(self.setting, self.arm), *seed]

    def record(self, out: Path) -> Path:
        """Where its record is, once it is finished."""
        return out / self.setting.name / self.arm.name / f"seed-{self.seed}.json"


def commit() -> str:
    """The commit of this checkout, with "-dirty" if the code differs from it.

    Raises:
        StudyError: this is no checkout.
    """
    found = [_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", "../rdp", ".")]
    if found[0] is None:
        raise StudyError("this is no git checkout, and records must say their commit: clone the repository")
    return found[0] + ("-dirty" if found[1] else "")


def read(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        StudyError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        for name in ("commit", "seconds", "result"):
            content[name]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is no record of a run ({error}): remove it, and it is made again") from error


class Job:
    """A run that goes on, in a process of its own which ends with this one."""

    def __init__(self, run: Run, *, data_dir: Path, work: Path, ours: str) -> None:
        self.run = run
        # Of another commit nothing is gone on with.
        self.folder = work / ours[:12] / run.setting.name / run.arm.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / f"seed-{run.seed}.log"
        self.fresh, self.started = not (self.folder / f"seed-{run.seed}").exists(), time.monotonic()
        places = ["--resume", "--no-progress", "--data-dir", str(data_dir), "--out", str(self.folder)]
        recipe, *rest = run.command()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / Path(recipe).name), *rest, *places],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                preexec_fn=functools.partial(die_with, os.getpid()),
            )

    def finish(self, out: Path, ours: str) -> str:
        """Write the record of a run that has ended and remove what else it left.

        Returns:
            What to say of it.

        Raises:
            StudyError: the code has changed since the study began.
        """
        if self.process.returncode != 0:
            lines = self.log.read_text(errors="replace").splitlines() or ["nothing"]
            return f"{self.run} ended with status {self.process.returncode}: {lines[-1]} (see {self.log})"
        seed = self.folder / f"seed-{self.run.seed}"
        config, environment, result = (_json(seed / f"{n}.json") for n in ("config", "environment", "result"))
        if environment["git_commit"] != ours.removesuffix("-dirty") or commit() != ours:
            raise StudyError(f"this checkout has changed since the study began at {ours[:12]}: put it back")
        environment.pop("command")
        cost = _json(self.folder / "cost.json")
        record = {
            "setting": self.run.setting.name,
            "arm": self.run.arm.name,
            "seed": self.run.seed,
            "commit": ours,
            "command": self.run.command(),
            "result": result,
            "seconds": time.monotonic() - self.started if self.fresh else result["train_seconds"],
            "image_flops": cost["image_flops"],
            "history": [json.loads(line) for line in (seed / "metrics.jsonl").read_text().splitlines()],
            "config": {name: value for name, value in config.items() if name not in PLACES},
            "environment": environment,
        }
        path = self.run.record(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(path)
        shutil.rmtree(seed)
        self.log.unlink()
        metric = self.run.setting.metric
        return f"{self.run}: {metric} {result[metric]:.4g}, {record['seconds'] / 60:.1f} minutes"


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
