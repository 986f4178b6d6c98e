"""Which checkpoint a run goes on from: the newest that is whole, and of the same run on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.loader import Loader

from engine import checkpoint
from engine.config import Config
from engine.errors import RunError
from engine.state import TrainState
from engine.validate import require, require_history, require_keys

_PARTS = (
    *("model", "optimizer", "scaler", "ema", "processes", "epoch", "step", "epoch_seconds", "seconds"),  # of TrainState
    *("history", "config", "data"),
)


def describe_data(train_data: Loader, test_data: Loader) -> dict[str, dict[str, Any]]:
    """What two runs must read alike to be the same run; it goes into each checkpoint."""
    return {
        split: {
            "loader": loader.kind,
            "samples": loader.samples,
            "classes": loader.classes,
            "channels": loader.channels,
            "listing": loader.listing,
        }
        for split, loader in (("training", train_data), ("test", test_data))
    }


def find_state(
    folder: Path, state: TrainState, config: Config, data: dict[str, dict[str, Any]], *, epochs: int, steps: int
) -> dict[str, Any] | None:
    """Read the checkpoint to go on from; nothing of it is applied.

    Args:
        folder: of the checkpoints.
        state: the run before its first step.
        config: must compute the same as the one that the run was started with.
        data: of `describe_data`.
        epochs: of the whole run.
        steps: optimizer steps in an epoch.

    Returns:
        The content; None if nothing was saved.

    Raises:
        RunError: the settings, the data or the number of processes differ, naming what; or no checkpoint is whole; or
            the processes do not see the same one.
    """

    def check(saved: dict[str, Any]) -> None:
        require_keys(saved, _PARTS, "content")
        require(isinstance(saved["config"], dict), "config", saved["config"])
        for name, value in saved["config"].items():
            require(isinstance(value, (str, int, float, list, tuple, type(None))), f"config.{name}", value)
        if changes := config.changes(saved["config"]):
            raise RunError(
                f"{folder.parent} was started with other settings, so --resume is refused: {'; '.join(changes)}"
            )
        require_keys(saved["data"], data, "data")
        if changes := _differences(saved["data"], data):
            raise RunError(
                f"{folder.parent} was started with other data, so --resume is refused: {'; '.join(changes)}; "
                f"{_way_back(saved['data'], data)}, or choose another --out"
            )
        state.check(saved, epochs=epochs, steps=steps)
        prefixes = ("",) if state.ema is None else ("", "ema_")
        require_history(saved["history"], saved["epoch"], prefixes, config.tested_epochs(epochs))

    found = checkpoint.load_latest(folder, check)
    positions = state.world.gather(None if found is None else (found["epoch"], found["step"]))
    if len(set(positions)) > 1:
        raise RunError(
            f"the processes do not read the same checkpoint in {folder}: it must be on a disk that all of them share"
        )
    return found


def _way_back(saved: dict[str, Any], ours: dict[str, dict[str, Any]]) -> str:
    kind = saved["training"]["loader"]
    if kind == ours["training"]["loader"]:
        return "give it back what it had"
    return f"give --loader {'ffcv' if kind == 'ffcv' else 'torch'}"  # files have appeared, or gone, for `auto`


def _differences(saved: dict[str, Any], ours: dict[str, dict[str, Any]]) -> list[str]:
    differences = []
    for split, parts in ours.items():
        require_keys(saved[split], parts, f"data.{split}")
        for name, value in parts.items():
            require(type(saved[split][name]) is type(value), f"data.{split}.{name}", saved[split][name])
            if saved[split][name] != value:
                differences.append(f"{split} {name}: {saved[split][name]} -> {value}")
    return differences
