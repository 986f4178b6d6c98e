"""Drop rates that change over training: factors on the rate of every branch, by the number of the optimizer step.

A schedule is any function of the step, counted from 0, that returns a factor in [0, 1]; FREEZE has that of the DROP
which it replays. Those made here can be pickled, and multiplied with each other and with functions::

    handle = rdp.attach(model, rate=0.2, rate_schedule=rdp.rate_schedules.warmup(5_000))
    rdp.rate_schedules.warmup(1_000) * rdp.rate_schedules.early(20_000)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rdp.errors import ArgumentError

__all__ = ["Factor", "RateSchedule", "early", "late", "linear", "warmup"]

RateSchedule = Callable[[int], float]
"""A function of the optimizer step, counted from 0, that returns a factor in [0, 1]."""


class Factor:
    """A schedule that can be multiplied with others."""

    def __call__(self, step: int) -> float:
        """The factor at an optimizer step."""
        raise NotImplementedError

    def __mul__(self, other: RateSchedule) -> Factor:
        return Product(self, other) if callable(other) else NotImplemented

    __rmul__ = __mul__


@dataclass(frozen=True)
class Product(Factor):
    """Both factors, multiplied."""

    one: RateSchedule
    other: RateSchedule

    def __call__(self, step: int) -> float:
        """The factor at an optimizer step."""
        return self.one(step) * self.other(step)


@dataclass(frozen=True)
class Linear(Factor):
    """See `linear`."""

    start: int
    stop: int

    def __call__(self, step: int) -> float:
        """The factor at an optimizer step."""
        return min(max((step - self.start) / (self.stop - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class Between(Factor):
    """1 from step `start` on, up to, without, step `stop`; 0 otherwise."""

    start: int
    stop: int | None

    def __call__(self, step: int) -> float:
        """The factor at an optimizer step."""
        return float(self.start <= step and (self.stop is None or step < self.stop))


def linear(start: int, stop: int) -> Factor:
    """0 at step `start` and 1 at step `stop`, linear between them and constant outside; it falls if `start` is later.

    Raises:
        ArgumentError: If they are no numbers of steps, or the same one.
    """
    if _steps("start", start) == _steps("stop", stop):
        raise ArgumentError(f"start and stop must be two steps; both are {start}. A step at once is late({start})")
    return Linear(start, stop)


def warmup(steps: int) -> Factor:
    """From 0 at step 0 linearly to 1 at step `steps`.

    Raises:
        ArgumentError: If `steps` is no number of steps above 0.

    Source: `drop_warmup` of stochastic depth in MosaicML Composer.
    """
    return Linear(0, _steps("steps", steps, 1))


def early(steps: int) -> Factor:
    """1 in the first `steps` steps, 0 from then on. Falling linearly instead: `linear(steps, 0)`.

    Raises:
        ArgumentError: If `steps` is no number of steps above 0.

    Source: Liu et al., "Dropout Reduces Underfitting", ICML 2023, for models that underfit.
    """
    return Between(0, _steps("steps", steps, 1))


def late(start: int) -> Factor:
    """0 in the first `start` steps, 1 from then on.

    Raises:
        ArgumentError: If `start` is no number of steps.

    Source: Liu et al., "Dropout Reduces Underfitting", ICML 2023, for models that overfit.
    """
    return Between(_steps("start", start), None)


def _steps(name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be a number of optimizer steps, an int of at least {least}; got {value!r}")
    return value
