"""How many kernels a branch launches more than in plain training, by model, mode and phase."""

from __future__ import annotations

import functools
from typing import Any

from device.programs import Run, inputs_of
from device.simulated import install

WAYS: dict[str, dict[str, Any]] = {
    "rows": {"compute": "rows", "sampling": "fixed", "rate": 0.25},
    "dense": {"compute": "dense", "sampling": "fixed", "rate": 0.25},
    "batch, all kept": {"mode": "batch", "compute": "rows", "rate": 1e-9},
    "batch, all dropped": {"mode": "batch", "compute": "rows", "rate": 1 - 1e-9},
}
"""How to train, whatever compute="auto" thinks of such small branches: in row mode two of eight rows are dropped. In
batch mode a branch is kept or dropped, and all lies between the two."""


def added(name: str, way: str) -> tuple[float, float]:
    """Launches of forward and backward that a branch adds to those of a plain step, in DROP and in FREEZE."""
    plain, run = _plain(name), Run(name, install(), [inputs_of(name)], False, WAYS[way])
    steps = [run.step() for _ in range(2)]
    drop, freeze = ((step.gradients.launches.total() - plain) / len(run.handle.branches) for step in steps)
    return drop, freeze


@functools.cache
def _plain(name: str) -> int:
    return Run(name, install(), [inputs_of(name)], False, None).step().gradients.launches.total()
