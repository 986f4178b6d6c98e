"""A run of one process in one folder: its lock, its settings, and a checkpoint of each of its parts.

with open_run(folder, config, resume=False) as config:
    path = config.folder / "checkpoint.pt"
    load(path, {"model": model}, {"epoch": 100})
    save(path, {"model": model}, {"epoch": 1})
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.errors import RunError
from engine.examine import similarity
from engine.files import write_atomically
from engine.folder import write_json
from engine.lock import claim
from engine.records import tell_result
from engine.validate import require, require_count, require_keys
from rdp.tensorboard import Events

SettingsT = TypeVar("SettingsT")


@contextmanager
def open_run(folder: Path, config: SettingsT, *, resume: bool) -> Iterator[SettingsT]:
    """Hold a folder and the settings in it.

    Args:
        folder: made if it is not there, unless `resume`.
        config: a dataclass; written down, but for paths, which are where the run is and not what it is.
        resume: go on with the run in the folder: only the types of `config` count.

    Yields:
        The settings of the run.

    Raises:
        RunError: another process holds the folder, or it holds a run already or, with `resume`, none.
    """
    path = folder / "config.json"
    own: dict[str, Any] = {n: v for n, v in dataclasses.asdict(config).items() if n not in ("out", "resume")}  # type: ignore[call-overload]
    if resume and not folder.is_dir():
        raise RunError(f"{folder} is no folder of a run to go on with: there is no such folder")
    with claim(folder):
        if resume:
            try:
                saved = json.loads(path.read_bytes())
                require_keys(saved, own, "content")
                saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
                for name, value in saved.items():
                    require(type(value) is type(own[name]), name, value)
            except (OSError, ValueError, RecursionError) as error:
                raise RunError(f"{folder} is no folder of a run to go on with: {path}: {error}") from error
            yield dataclasses.replace(config, **saved)  # type: ignore[type-var]
            return
        if path.exists():
            raise RunError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")
        write_json(path, own)
        yield config


def save(path: Path, parts: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write a checkpoint; the old one stays until the new one is whole.

    Args:
        path: of the checkpoint.
        parts: what has a `state_dict`, by name.
        values: what else belongs to it.

    Raises:
        RunError: it cannot be written.
    """
    torch.save({**values, **{name: part.state_dict() for name, part in parts.items()}}, buffer := io.BytesIO())
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; what was saved before is untouched: go on with --resume"
        ) from error


def load(path: Path, parts: Mapping[str, Any], most: Mapping[str, float]) -> dict[str, Any] | None:
    """Put a checkpoint, if there is one, into the parts.

    Args:
        path: of the checkpoint.
        parts: what has a `load_state_dict`, by name.
        most: the largest value that each count in it may have.

    Returns:
        Its content; None if there is none.

    Raises:
        RunError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        for name, value in most.items():
            require_count(state[name], value, name)
        require(isinstance(state["snapshots"], dict), "snapshots", state["snapshots"])
        for name, part in parts.items():
            part.load_state_dict(dict(state[name].items()))
    except Exception as error:  # of as many kinds as there are parts
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{path} is damaged, remove it to start this algorithm again: {cause}") from error
    return state


def finish(folder: Path, result: dict[str, Any], features: list[Tensor], events: Events, step: int) -> None:
    """Leave what other recipes leave, for `tools/figures.py compare`, and tell TensorBoard.

    Args:
        folder: where result.json and similarity.json go.
        result: the numbers of the run, and what it is.
        features: of the input and the layers.
        events: of the run.
        step: optimizer steps done.
    """
    alike = similarity(features)
    write_json(folder / "similarity.json", alike)
    write_json(folder / "result.json", result)
    reuse = {name: value for name, value in alike.items() if isinstance(value, float)}
    tell_result(events, {**result, **reuse}, step)
