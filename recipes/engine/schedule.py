"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

WARMUP_FROM = 1e-5  # timm's --warmup-lr


def learning_rate(
    step: float, steps: int, *, peak: float, warmup: int = 0, shape: Literal["cosine", "linear"] = "cosine"
) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: which one, from 0; of `unsqueezed`, if the schedule is squeezed.
        steps: how many there are in all.
        peak: the highest learning rate.
        warmup: steps of linear growth at the start, from 1e-5.
        shape: how it falls to 0 at `steps`: "cosine" over all of them as in timm (whose warm-up hides the start of the
            cosine), or "linear" from the end of the warm-up as in ffcv-imagenet.

    Returns:
        The learning rate.

    Source:
        timm's CosineLRScheduler with `t_in_epochs=False`; ffcv-imagenet's `get_cyclic_lr`.
    """
    if step < warmup:
        return WARMUP_FROM + (peak - WARMUP_FROM) * step / warmup
    if shape == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * (steps - step) / max(1, steps - warmup)


def unsqueezed(step: int, steps: int, whole: int, start: float) -> float:
    """Where a squeezed schedule stands in the whole one, which it follows up to a share of it and then passes faster.

    Args:
        step: which one, from 0.
        steps: how many there are.
        whole: how many the whole schedule has.
        start: the share of the whole schedule that is left as it is.

    Returns:
        The step of the whole schedule; both end together.
    """
    kept = start * whole
    return step if step < kept or steps == whole else kept + (step - kept) * (whole - kept) / (steps - kept)
