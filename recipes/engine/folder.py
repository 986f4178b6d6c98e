"""The results folder of one seed: what is in it, and whether a run may use it.

results/mnist/resnet50/rdp-row-0.1/seed-0/
    config.json  environment.json  metrics.jsonl  result.json (once finished)  checkpoints/  tensorboard/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from engine import checkpoint
from engine.config import Config
from engine.errors import RunError
from engine.files import write_atomically

_PACKAGES = ("residual-droppath", "torch", "torchvision", "timm", "torchmetrics", "numpy", "ffcv")


def is_finished(config: Config, seed: int) -> bool:
    """Look at the results folder of a seed before anything is read or written.

    Args:
        config: a resumed run must have the same one, but for where it runs.
        seed: whose folder.

    Returns:
        Whether there is nothing left to do.

    Raises:
        RunError: the folder holds another run, or one that `--resume` was not given for.
    """
    folder = seed_folder(config, seed)
    saved = folder / "config.json"
    if not saved.exists() and not checkpoint.find(folder / "checkpoints"):
        return False
    if not config.resume:
        raise RunError(f"{folder} already holds a run: go on with --resume, or choose another --out")
    if not saved.exists():  # the checkpoints hold the settings too, and are compared before they are used
        return False
    if changes := config.changes(read_json(saved)):
        raise RunError(f"{folder} was started with other settings, so --resume is refused: {'; '.join(changes)}")
    result = folder / "result.json"
    return result.exists() and bool(read_json(result))


def begin(config: Config, seed: int) -> Path:
    """Write down what will run, and on what, into the results folder, which must exist."""
    folder = seed_folder(config, seed)
    write_json(folder / "environment.json", environment())
    write_json(folder / "config.json", config.to_json())
    return folder


def seed_folder(config: Config, seed: int) -> Path:
    """Where the results of one seed go."""
    return config.folder / f"seed-{seed}"


def environment() -> dict[str, object]:
    """What the numbers of a run depend on besides its configuration."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [Path(sys.executable).name, *sys.argv],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def read_json(path: Path) -> dict[str, object]:
    """Read a file that `write_json` wrote.

    Raises:
        RunError: it is not JSON, or something else than an object of it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON ({error}): remove it, and go on with --resume") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds {str(content)[:40]} and no settings: remove it, and go on with --resume")
    return content


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a file of indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _git(*arguments: str) -> str | None:
    # None where the recipes are not in a git checkout, or git is not installed: an installed copy has no commit.
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
