"""What does Residual DropPath buy at a given cost? The study of docs/evidence.md: arms x seeds of each setting.

    python recipes/study.py --data-dir DATA                   # resnet, vit and gpt: about 12 core-hours
    python recipes/study.py --data-dir DATA --list            # what is done, what is left and how long it will take
    python recipes/study.py --settings trial                  # minutes, to try the command
    python recipes/study.py --settings gpt --arms standard rdp-row --seeds 10 11 12

Runs go one after the other (or `--jobs N` at a time), of one thread each, at the lowest priority, on a GPU if there is.
The command may be killed at any time, also with `kill -9`; started again it goes on from the last checkpoints. Each
finished run leaves one small record, OUT/SETTING/ARM/seed-N.json, with the commit, the settings, the environment and
every number; its checkpoints are removed. Several such commands may share a folder. A setting is never of two commits.
tools/study_report.py makes the table and the figure.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import engine  # noqa: F401 (first: Ctrl-C ends its imports)
import tyro
from engine import interruptible
from engine.messages import log
from study_arms import SETTINGS, arms
from study_run import Job, Run, StudyError, commit, read

AFFORDABLE = ("resnet", "vit", "gpt")


@dataclass(frozen=True)
class Args:
    """Run the study of docs/evidence.md, or what is left of it."""

    settings: tuple[str, ...] = AFFORDABLE
    """Which of resnet, vit, gpt, resnet50, resnet50d (the paper's cells, for a GPU) and trial."""
    arms: tuple[str, ...] = ()
    """Which arms; default: all of a setting, those that matter with five seeds before the others with three."""
    seeds: tuple[int, ...] = ()
    """Which seeds; default: 0 to 4, or 0 to 2."""
    data_dir: Path = Path("data")
    """CIFAR-10, as recipes/cifar10.py takes it."""
    out: Path = Path("results/study")
    """Where records go."""
    work: Path = Path("runs/study")
    """Where checkpoints go, until a run is finished."""
    jobs: int = 1
    """Runs at a time."""
    list_only: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Only say what is done, what is left and how long it will take."""


def plan(args: Args) -> list[Run]:
    """All runs that are asked for, done or not, in the order in which they are worth most.

    Arms that matter come first, and of these each seed of all settings before the next seed. Whether the learning rate
    is near its best is looked at with the first seed.

    Raises:
        StudyError: there is no such setting or arm.
    """
    runs = []
    for name in args.settings:
        if name not in SETTINGS:
            raise StudyError(f"there is no setting {name}: choose among {', '.join(SETTINGS)}")
        setting = SETTINGS[name]
        known = {arm.name: arm for arm in arms(setting)}
        if unknown := set(args.arms) - known.keys():
            raise StudyError(f"{name} has no arm {min(unknown)}: choose among {', '.join(known)}")
        chosen = [known[arm] for arm in args.arms] or list(known.values())
        runs += [Run(setting, arm, seed) for arm in chosen for seed in args.seeds or range(arm.seeds)]
    most = max((run.arm.seeds for run in runs), default=0)

    def worth(run: Run) -> tuple[bool, int]:
        later = run.arm.seeds < most and not (run.arm.tunes and run.seed == 0)
        return later, run.seed

    return sorted(runs, key=worth)  # stable: settings and arms as they are named


def check(runs: Sequence[Run], args: Args, ours: str) -> None:
    """Refuse what would make a study of which nobody knows what it is of.

    Raises:
        StudyError: the code differs from its commit, records are of another one, or there is no GPU for a setting.
    """
    for setting in {run.setting.name: run.setting for run in runs}.values():
        if ours.endswith("-dirty") and setting.name != "trial":
            raise StudyError("rdp/ or recipes/ differ from their commit: use a clean checkout of its own")
        for path in sorted((args.out / setting.name).glob("*/seed-*.json")):
            theirs = read(path)["commit"]
            if theirs != ours:
                raise StudyError(
                    f"{path} is of commit {theirs[:12]} and this checkout is {ours[:12]}: a setting is of one "
                    "commit, so check that one out, or choose another --out"
                )
        if setting.gpu and not _has_gpu():
            raise StudyError(f"{setting.name} is for a GPU, and torch sees none: leave it out")


def estimate(runs: Sequence[Run], args: Args) -> float:
    """The seconds that runs will take, from those of their setting that are finished."""
    seconds = 0.0
    for setting in {run.setting.name: run.setting for run in runs}.values():
        costs = {arm.name: arm.cost for arm in arms(setting)}
        paths = [p for p in (args.out / setting.name).glob("*/seed-*.json") if p.parent.name in costs]
        done = [read(path)["seconds"] / costs[path.parent.name] for path in paths]
        unit = sum(done) / len(done) if done else setting.seconds
        seconds += sum(unit * run.arm.cost for run in runs if run.setting is setting)
    return seconds / max(1, args.jobs)


def work_off(runs: Sequence[Run], args: Args, ours: str) -> list[str]:
    """Run what is not done, `jobs` at a time.

    Returns:
        What went wrong, a sentence for each run that is not finished.
    """
    jobs: list[Job] = []
    failed: list[str] = []
    left = [run for run in runs if not run.record(args.out).exists()]
    while left or jobs:
        while left and len(jobs) < args.jobs:
            run = left.pop(0)
            if not run.record(args.out).exists():  # another command may have made it meanwhile
                jobs.append(Job(run, data_dir=args.data_dir, work=args.work, ours=ours))
        time.sleep(0.2)
        for job in [job for job in jobs if job.process.poll() is not None]:
            jobs.remove(job)
            said = job.finish(args.out, ours)
            if job.process.returncode != 0:
                failed.append(said)
            waiting = [job.run for job in jobs] + left
            hours = estimate(waiting, args) / 3600
            log.info("%s; %d runs left, about %.1f hours", said, len(waiting), hours)
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says.

    Raises:
        SystemExit: with status 1 if something is wrong, or a run could not be finished.
    """
    with interruptible():
        args = tyro.cli(Args, args=arguments, description=__doc__)
    try:
        runs = plan(args)
        left = [run for run in runs if not run.record(args.out).exists()]
        ours = commit()
        for setting in {run.setting.name: run.setting for run in runs}.values():
            of_it = [run for run in left if run.setting is setting]
            total = sum(run.setting is setting for run in runs)
            hours = estimate(of_it, args) / 3600
            print(f"{setting.name}: {total - len(of_it)} of {total} runs done, about {hours:.1f} hours left")
        if args.list_only:
            print("\n".join(map(str, left)))
            return
        check(runs, args, ours)
        os.nice(19)
        failed = work_off(runs, args, ours)
    except StudyError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    if failed:
        sys.exit("\n".join([f"error: {len(failed)} runs are not finished; the same command tries them again", *failed]))


def _has_gpu() -> bool:
    import torch  # takes seconds, which --list need not wait for

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
