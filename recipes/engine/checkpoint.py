"""Checkpoints that survive being killed while they are written.

A checkpoint is `epoch-003-step-00120-1a2b3c4d5e6f7081.pt`: where the run stood, and the start of the SHA-256 of its
bytes (the custom of torch.hub), so a damaged file is noticed and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.errors import RunError
from engine.files import write_atomically

# What torch.load raises of bytes that are not a checkpoint has no common base.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, AttributeError, KeyError, TypeError)
KEEP = 2  # the newest, and one good one to fall back on
_NAME = re.compile(r"epoch-(?P<epoch>\d+)-step-(?P<step>\d+)-(?P<digest>[0-9a-f]{16})\.pt")


def save(folder: Path, state: dict[str, Any], epoch: int, step: int) -> Path:
    """Write a checkpoint and remove those that it makes superfluous.

    Args:
        folder: made if it is not there; the one that it is in must be there.
        state: tensors, numbers, strings, and lists, tuples and dicts of them.
        epoch: the epoch that the run is in.
        step: optimizer steps done in this epoch.

    Returns:
        The new file.

    Raises:
        RunError: it cannot be written; the checkpoints before it are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"epoch-{epoch:03d}-step-{step:05d}-{digest}.pt"
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        before = [old for old in find(folder) if old != path]
        write_atomically(path, content)
    except OSError as error:
        raise RunError(
            f"cannot write a checkpoint of {len(content) / 1e6:.0f} MB to {folder}: {error.strerror}; "
            "what was saved before is untouched: make room, then go on with --resume"
        ) from error
    for old in before[: len(before) - (KEEP - 1)]:
        old.unlink()
    return path


def load_latest(folder: Path, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: where `save` wrote.
        check: looks at a checkpoint's content, and raises a `ValueError` if it is not what it should be, or a
            `RunError` if it is sound and of another run.

    Returns:
        The state, with its tensors on the CPU; None if no checkpoint was ever written.

    Raises:
        RunError: there are checkpoints and none is whole, or what `check` raised.
    """
    paths = find(folder)
    for path in reversed(paths):
        try:
            content = _read(path)
            if check is not None:
                check(content)
            return content
        except RunError:  # a sound one, which `check` refuses
            raise
        except _DAMAGED as error:
            warnings.warn(f"skipping the damaged checkpoint {path}: {_sentence(error)}", stacklevel=2)
    if paths:
        raise RunError(f"all {len(paths)} checkpoints in {folder} are damaged: remove the folder and start again")
    return None


def find(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first, also while a run writes there and removes what is superfluous."""
    found = []
    for path in folder.glob("epoch-*.pt"):
        if match := _NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                found.append((int(match["epoch"]), int(match["step"]), path.stat().st_mtime_ns, path))
    return [path for *_, path in sorted(found)]


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    match = _NAME.fullmatch(path.name)
    if match is None or hashlib.sha256(content).hexdigest()[:16] != match["digest"]:
        raise ValueError("its content does not match the checksum in its name")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a run")
    return state


def _sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
