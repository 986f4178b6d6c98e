"""The faults: what goes wrong, in which command, and what has to be said of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.checkpoint import find

from tests.faults.harness import RECIPES, Fault, Run
from tests.faults.start import Forked

ONE = "mnist"
WORKERS = "imagenet, 2 workers"
RANKS = "imagenet, 2 processes"
SPIRAL = "spiral"

# A checkpoint after each step, so that a fault need not wait for one.
_TINY = ["--model", "test_resnet", "--algorithm", "standard", "--device", "cpu", "--epochs", "100000"]
_TINY += ["--warmup-epochs", "0", "--checkpoint-minutes", "1e-9", "--seeds", "1", "--no-progress", "--resume"]
_IMAGENET = [str(RECIPES / "imagenet_ffcv.py"), *_TINY, "--loader", "torch", "--batch-size", "8"]
_IMAGENET += ["--resolution", "32", "--test-resolution", "32", "--data-dir"]


def commands(data: Path) -> dict[str, list[str]]:
    """What is started, by the names that the table uses; all would train forever."""
    mnist = [str(RECIPES / "mnist.py"), "--quick", *_TINY, "--limit", "4000", "--batch-size", "16"]
    return {
        ONE: mnist,
        WORKERS: [*_IMAGENET, str(data), "--devices", "1", "--workers", "2"],
        RANKS: [*_IMAGENET, str(data), "--devices", "2", "--workers", "1"],
        SPIRAL: [str(RECIPES / "spiral_mlp.py"), "--algorithm", "rdp", "--epochs", "100000", "--samples", "512"],
    }


def send(number: signal.Signals, whom: Callable[[Run], int] = lambda run: run.process.pid) -> Callable[[Run], None]:
    return lambda run: os.kill(whom(run), number)


def send_group(number: signal.Signals) -> Callable[[Run], None]:
    return lambda run: os.killpg(run.process.pid, number)


def child(index: int) -> Callable[[Run], int]:
    return lambda run: run.children()[index]


def worker_of_a_rank(run: Run) -> int:
    from tests.faults.harness import children

    return children(run.children()[-1])[0]


def remove_whole(folder: Path) -> None:
    """As `rm -rf`, again for what the run writes meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def replace_by_empty_folder(run: Run) -> None:
    remove_whole(run.folder)
    run.folder.mkdir()


def start_a_second(run: Run) -> None:
    """The same command once more, beside it: it is refused, and the first one is then stopped."""
    arguments = [*commands(run.data)[ONE], "--out", str(run.out)]
    assert Forked(arguments, run.log, {"OMP_NUM_THREADS": "1"}).wait(240) == 1  # it says so in the same log
    os.kill(run.process.pid, signal.SIGTERM)


def checkpoints_become_a_file(run: Run) -> None:
    shutil.move(run.folder / "checkpoints", run.folder / "moved")
    (run.folder / "checkpoints").touch()
    time.sleep(0.2)


def spoil_images(run: Run) -> None:
    for path in (run.data / "train").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])


def write(name: str, content: str) -> Callable[[Path, Path], None]:
    return lambda out, data: (out / "seed-0" / name).write_text(content) and None


def remove(name: str) -> Callable[[Path, Path], None]:
    return lambda out, data: (out / "seed-0" / name).unlink()


def remove_an_image(out: Path, data: Path) -> None:
    next((data / "train" / "red").iterdir()).unlink()


def cut_newest(out: Path, data: Path) -> None:
    newest = find(out / "seed-0" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-50])


def cut_all(out: Path, data: Path) -> None:
    for path in find(out / "seed-0" / "checkpoints"):
        path.write_bytes(path.read_bytes()[:1000])


def rewrite_newest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    """Another content in the newest checkpoint, under a digest that fits."""

    def prepare(out: Path, data: Path) -> None:
        folder = out / "seed-0" / "checkpoints"
        content = checkpoint.load_latest(folder)
        assert content is not None
        epoch, step = content["epoch"], content["step"]
        *before, newest = find(folder)
        kept = [(path, path.read_bytes()) for path in before]
        newest.unlink()
        checkpoint.save(folder, change(content), epoch, step)
        for path, data_before in kept:
            path.write_bytes(data_before)

    return prepare


def spiral_checkpoint(content: bytes | None = None) -> Callable[[Path, Path], None]:
    def prepare(out: Path, data: Path) -> None:
        path = out / "rdp" / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:500] if content is None else content)

    return prepare


RESUME = "go on with --resume"
KILLED = f"error: a process of the run was killed .SIGKILL.*{RESUME}"
WORKER = f"error: a worker process that reads images has ended .*{RESUME}"
SAVED = f"stopped and saved in .*{RESUME}"
GONE = "error: .* was removed or replaced while the run went on"
ENVIRONMENT = {"WORLD_SIZE": "2"}

FAULTS: list[Fault] = [
    *(
        Fault(f"{number.name} in mid-epoch", ONE, SAVED, 128 + number, inject=send(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    ),
    Fault("kill -9", ONE, inject=send(signal.SIGKILL), status=-9),
    Fault("Ctrl-C while importing", ONE, status=-2, inject=send(signal.SIGINT), after=1.0),
    Fault("SIGTERM while importing", ONE, status=-15, inject=send(signal.SIGTERM), after=1.0),
    Fault("Ctrl-C in start-up", ONE, "error: interrupted", 130, inject=send(signal.SIGINT), when="reading the data"),
    Fault("SIGTERM in start-up", ONE, status=-15, inject=send(signal.SIGTERM), when="reading the data"),
    Fault("the same command a second time", ONE, "in use by process .* since", 143, inject=start_a_second),
    Fault("folder removed", ONE, GONE, 1, inject=lambda run: remove_whole(run.folder), takes_away=True),
    Fault("folder replaced by an empty one", ONE, GONE, 1, inject=replace_by_empty_folder, takes_away=True),
    Fault(
        "a file in place of checkpoints/",
        ONE,
        "error: cannot write a checkpoint",
        1,
        inject=checkpoints_become_a_file,
        takes_away=True,
    ),
    Fault(
        "files limited to 64 kB (ulimit -f)", ONE, "error: cannot write a ch.*too large", 1, shell='ulimit -f 64; "$@"'
    ),
    Fault("memory limited to 1.5 GB (ulimit -v)", ONE, "error: out of memory", 1, shell='ulimit -v 1500000; "$@"'),
    Fault("memory limited to 3.3 GB (ulimit -v)", ONE, "error: out of memory", 1, shell='ulimit -v 3300000; "$@"'),
    Fault(
        "results on a read-only disk", ONE, "cannot make the results folder .* --out", 1, arguments=("--out", "/proc/x")
    ),
    # What is printed.
    *(
        Fault(name, command, shell=shell, survives=True, arguments=resume)
        for command, resume in ((ONE, ()), (SPIRAL, ("--resume-from-out",)))
        for name, shell in {
            "stdout and stderr on a full disk": '"$@" >/dev/full 2>&1',
            "stdout and stderr closed": '"$@" >&- 2>&-',
            "stdin, stdout and stderr closed": '"$@" <&- >&- 2>&-',
            "stdout a broken pipe": '"$@" | head -n 3 >/dev/null',
            "HOME unset": 'unset HOME; "$@"',
            "one CPU": 'exec taskset -c 0 "$@"',
        }.items()
    ),
    Fault(
        "ASCII terminal, path of other letters",
        ONE,
        shell='"$@"',
        survives=True,
        arguments=("--out", "{unicode}"),
        environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    ),
    # Where it runs.
    Fault("TERM=dumb", ONE, environment={"TERM": "dumb"}, arguments=("--progress",), survives=True),
    Fault("nohup", ONE, shell='trap "" HUP; "$@"', survives=True, inject=send(signal.SIGHUP)),
    Fault("one CPU", WORKERS, shell='exec taskset -c 0 "$@"', survives=True),
    Fault("WORLD_SIZE without the rest", ONE, "WORLD_SIZE is set and RANK, .*torchrun", 1, environment=ENVIRONMENT),
    Fault(
        "WORLD_SIZE of something else",
        ONE,
        "error: WORLD_SIZE",
        1,
        environment={"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    ),
    Fault(
        "torchrun ... --devices 2",
        ONE,
        "error: --devices 2, but torchrun has started 1 process",
        1,
        arguments=("--devices", "2"),
        shell='P=$1; shift; exec "$P" -m torch.distributed.run --standalone "$@"',
    ),
    # Its processes.
    Fault("kill -9 of a worker", WORKERS, WORKER, 1, inject=send(signal.SIGKILL, child(0))),
    Fault("kill -9 of the run", WORKERS, status=-9, inject=send(signal.SIGKILL)),
    Fault("SIGTERM to the process group", WORKERS, SAVED, 143, inject=send_group(signal.SIGTERM)),
    Fault("Ctrl-C of a terminal", WORKERS, SAVED, 130, inject=send_group(signal.SIGINT)),
    Fault("images damaged in mid-epoch", WORKERS, "error: .* cannot be decoded", 1, inject=spoil_images),
    Fault("kill -9 of rank 0", RANKS, KILLED, 1, inject=send(signal.SIGKILL, child(0))),
    Fault("kill -9 of rank 1", RANKS, KILLED, 1, inject=send(signal.SIGKILL, child(-1))),
    Fault("kill -9 of the launcher", RANKS, status=-9, inject=send(signal.SIGKILL)),
    Fault("kill -9 of a rank's worker", RANKS, WORKER, 1, inject=send(signal.SIGKILL, worker_of_a_rank)),
    Fault("SIGTERM to the launcher", RANKS, SAVED, 143, inject=send(signal.SIGTERM)),
    Fault("SIGUSR1 to the launcher", RANKS, SAVED, 143, inject=send(signal.SIGUSR1)),
    Fault("SIGHUP to the launcher", RANKS, SAVED, 129, inject=send(signal.SIGHUP)),
    # What it goes on with: `--resume` in a folder with two checkpoints.
    Fault("config.json is []", ONE, "error: .* no settings", 1, write("config.json", "[]")),
    Fault("config.json is null", ONE, "error: .* no settings", 1, write("config.json", "null")),
    Fault("config.json is cut", ONE, "error: .* not valid JSON", 1, write("config.json", '{"model": ')),
    Fault(
        "config.json gone, other --lr",
        ONE,
        "other settings.* lr: ",
        1,
        remove("config.json"),
        arguments=("--lr", "0.7"),
    ),
    Fault("config.json gone", ONE, prepare=remove("config.json"), survives=True),
    Fault("other settings", ONE, "other settings.* optimizer: sgd -> adamw", 1, arguments=("--optimizer", "adamw")),
    Fault("an image removed", WORKERS, "other data.* training samples: 72 -> 71", 1, remove_an_image),
    Fault("resumed on two processes", ONE, "other settings.* devices: 1 -> 2", 1, arguments=("--devices", "2")),
    Fault("lock of a run that was killed", ONE, prepare=write(".lock", '{"pid": 1}'), survives=True),
    Fault("newest checkpoint cut", ONE, "skipping the damaged", None, cut_newest, survives=True),
    Fault("all checkpoints cut", ONE, "error: all 2 checkpoints in .* are damaged", 1, cut_all),
    *(
        Fault(f"newest checkpoint: {name}", ONE, "skipping the damaged", None, rewrite_newest(change), survives=True)
        for name, change in {
            "an empty list": lambda state: [],
            "no history": lambda state: {key: state[key] for key in state if key != "history"},
            "half a model": lambda state: state | {"model": dict(list(state["model"].items())[::2])},
            "step of text": lambda state: state | {"step": "1"},
            "no processes": lambda state: state | {"processes": []},
            "optimizer without groups": lambda state: state | {"optimizer": {"state": {}, "param_groups": []}},
        }.items()
    ),
    Fault(
        "checkpoint cut", SPIRAL, "checkpoint.pt is damaged", 1, spiral_checkpoint(), arguments=("--resume-from-out",)
    ),
    *(
        Fault(f"{number.name} in mid-epoch", SPIRAL, SAVED, 128 + number, inject=send(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    ),
    Fault("kill -9", SPIRAL, inject=send(signal.SIGKILL), status=-9),
    Fault(
        "folder removed",
        SPIRAL,
        "error: cannot .* No such file",
        1,
        inject=lambda run: remove_whole(run.out),
        takes_away=True,
    ),
    Fault("Ctrl-C while importing", SPIRAL, status=-2, inject=send(signal.SIGINT), after=1.0),
]
