"""What a training step costs in FLOPs beside a step of standard training: for Table 1 and for `--match cost`."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import rdp
from engine.config import Config
from engine.model import attach

ROWS = 2  # FLOPs are proportional to the rows; BatchNorm on a 1x1 map needs two
STEPS = 32  # an even number: DROP and FREEZE equally often


def relative_flops(model: nn.Module, config: Config, images: Tensor, labels: Tensor) -> float:
    """Count the FLOPs of forward and backward with the algorithm, divided by those without.

    A count, not a timing, so it is the same on every machine. Masks are random: the mean over 32 steps and all
    branches is good to about 1 %.

    Args:
        model: plain; a copy is measured, the model itself is not touched.
        config: the algorithm.
        images: `Tensor[N, C, H, W]`, of which two are used.
        labels: `Tensor[N]`.

    Returns:
        The ratio: 1 for standard, about 0.65 at best for RDP at a constant rate of 0.1.
    """
    if config.algorithm == "standard":
        return 1.0
    images, labels = images[:ROWS], labels[:ROWS]
    plain = copy.deepcopy(model).train()
    standard = STEPS * _flops(plain, images, labels, steps=1)
    handle = attach(plain, config, seed=0, example=images)
    assert handle is not None
    return _flops(plain, images, labels, steps=STEPS, handle=handle) / standard


def _flops(
    model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, handle: rdp.ResidualDropPath | None = None
) -> int:
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            functional.cross_entropy(model(images), labels).backward()
            if handle is not None:
                handle.advance()
    return counter.get_total_flops()


def matched_epochs(config: Config, relative: float) -> int:
    """How many epochs the run gets: those of the configuration, or with `--match cost` as many as cost the same FLOPs.

    Args:
        config: `epochs` and `match`.
        relative: of `relative_flops`.
    """
    return config.epochs if config.match == "steps" else max(1, round(config.epochs / relative))
