"""At the end of a run: what each branch is worth to the network (docs/shallower.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rdp
from engine.messages import log
from rdp.analysis import lesions
from rdp.tensorboard import lesion_panel, png


def measure_lesions(
    handle: rdp.ResidualDropPath, top1: Callable[[], float], folder: Path | None, *, progress: bool
) -> dict[str, Any]:
    """Test a network without each of its branches, and without more and more of them.

    Args:
        handle: of the trained model.
        top1: tests the model.
        folder: where the picture goes, of the process that writes; None for the others.
        progress: show a progress bar.

    Returns:
        The numbers, for `result.json`.
    """
    found = lesions(handle, top1, progress=progress)
    if folder is not None:
        log.info("%s", found)
        (folder / "lesions.png").write_bytes(png(lesion_panel(found, metric="top-1")))
    return dataclasses.asdict(found)
