"""What a training step costs in FLOPs beside a step of standard training: for Table 1 and for `--match cost`.

It is counted once for a configuration and kept beside its seeds, in cost.json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import rdp
from engine.config import Config
from engine.folder import write_json
from engine.launch import World
from engine.model import attach

NAME = "cost.json"


@dataclass(frozen=True)
class Cost:
    """What a step costs."""

    relative_flops: float
    """Mean over the whole training, divided by a step of standard training."""
    image_flops: float
    """Of forward and backward of one image in standard training."""


def cost_of(
    model: nn.Module,
    config: Config,
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[object]],
    world: World,
) -> Cost:
    """Read what a step of the configuration costs, or count it.

    Args:
        model: plain; left alone.
        config: the algorithm.
        images: a micro-batch as it is trained on.
        labels: `Tensor[N]`.
        autocast: a context for the forward.
        world: the processes; each counts with rows of its own, and the mean holds.

    Returns:
        The same in every process, and in every seed.
    """
    saved: Cost | None = None
    if world.is_first:
        try:
            content: dict[str, Any] = json.loads((config.folder / NAME).read_bytes())
            if content.pop("counted_of") == _counted_of(config, images):
                saved = Cost(**content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # counting again is always right
    saved = world.gather(saved)[0]
    if saved is not None:
        return saved
    costs = world.gather((relative_flops(model, config, images, labels, autocast), image_flops(model, images, labels)))
    relative, of_image = (sum(numbers) / world.size for numbers in zip(*costs, strict=True))
    return Cost(1 - config.dropping * (1 - relative), of_image)


def keep(cost: Cost, config: Config, images: Tensor) -> None:
    """Write down what `cost_of` has found, once the run has begun."""
    write_json(config.folder / NAME, {**asdict(cost), "counted_of": _counted_of(config, images)})


def _counted_of(config: Config, images: Tensor) -> dict[str, object]:
    return {"config": config.identity(), "images": list(images.shape)}


def image_flops(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The FLOPs of forward and backward of one image in standard training.

    Args:
        model: plain; a copy is measured.
        images: `Tensor[N, C, H, W]`.
        labels: `Tensor[N]`.
    """
    few = min(2, len(images))  # BatchNorm on a 1x1 map needs two
    return _flops(copy.deepcopy(model).train(), images[:few], labels[:few], nullcontext, steps=1) / few


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
        config: the algorithm, and `count_steps`.
        images: `Tensor[N, C, H, W]`, a micro-batch as it is trained on: a branch that is not run row by row saves only
            where all its rows have one mask, which is common among two rows and rare among 128.
        labels: `Tensor[N]`.
        autocast: a context for the forward, so that no more memory is taken than in training.

    Returns:
        The ratio where the algorithm is on: 1 for standard, about 0.65 at best for RDP at a constant rate of 0.1.
    """
    if config.algorithm == "standard":
        return 1.0
    if config.mode == "batch":
        steps, rows = config.count_steps, 2  # one mask, whatever the rows; BatchNorm on a 1x1 map needs two
    else:
        rows = len(images)
        # Many rows average over the masks as well as many steps.
        steps = max(4, min(config.count_steps, 32 * config.count_steps // rows))
    steps += -steps % len(config.phases)  # every phase equally often
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
    """How many epochs the run gets: those of the configuration, or fewer if its schedule is squeezed.

    With `--match cost` it gets as many as cost the same FLOPs.

    Args:
        config: `epochs`, `match` and the squeeze.
        relative: of `Cost`.
    """
    return max(1, round(config.epochs * config.length if config.match == "steps" else config.epochs / relative))
