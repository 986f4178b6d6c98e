"""What a training step costs in FLOPs beside a step of standard training: for Table 1 and for `--match cost`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import rdp
from engine.config import Config
from engine.model import attach

STEPS = 32  # an even number, as all below: DROP and FREEZE equally often


def relative_flops(
    model: nn.Module,
    config: Config,
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Count the FLOPs of forward and backward with the algorithm, divided by those without.

    A count, not a timing, so it is the same on every machine. Masks are random: the mean over steps, rows and branches
    is good to about 1 %.

    Args:
        model: plain; a copy is measured, the model itself is not touched.
        config: the algorithm.
        images: `Tensor[N, C, H, W]`, a micro-batch as it is trained on: a branch that is not run row by row saves only
            where all its rows have one mask, which is common among two rows and rare among 128.
        labels: `Tensor[N]`.
        autocast: a context for the forward, so that no more memory is taken than in training.

    Returns:
        The ratio: 1 for standard, about 0.65 at best for RDP at a constant rate of 0.1.
    """
    if config.algorithm == "standard":
        return 1.0
    if config.mode == "batch":
        steps, rows = STEPS, 2  # one mask, whatever the rows; BatchNorm on a 1x1 map needs two
    else:
        rows = len(images)
        steps = max(4, min(STEPS, 512 // rows * 2))  # many rows average over the masks as well as many steps
    images, labels = images[:rows], labels[:rows]
    plain = copy.deepcopy(model).train()
    standard = steps * _flops(plain, images, labels, autocast, steps=1)
    handle = attach(plain, config, seed=0, example=images[:2])
    assert handle is not None
    return _flops(plain, images, labels, autocast, steps=steps, handle=handle) / standard


def _flops(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    steps: int,
    handle: rdp.ResidualDropPath | None = None,
) -> int:
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            with autocast():
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
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
