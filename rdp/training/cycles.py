"""Which step comes when, and at which rates: a cycle is a DROP step and those that replay it, at the rates of DROP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

from rdp.branches import Branch
from rdp.errors import ArgumentError
from rdp.options import Options
from rdp.phases import Phase, Schedule
from rdp.rates import rates_of
from rdp.training.frozen import Probes
from rdp.training.step import Draw, Step


class Cycles:
    """Makes the steps of a run.

    Args:
        options: What `attach` was asked for.
        probes: See `Step`.

    Attributes:
        schedule: Of phases.
        rate: Of the deepest branch, without the schedule of rates, as it was set last.
    """

    def __init__(self, options: Options, probes: Probes) -> None:
        self.schedule = Schedule(options.phases)
        self.rate = options.rate
        self._options = options
        self._probes = probes
        self._branches: Sequence[Branch] = ()
        self._latest: tuple[float, tuple[float, ...]] = 0.0, ()

    def found(self, branches: Sequence[Branch]) -> None:
        """The branches are known."""
        self._branches = branches
        self._latest = 0.0, self.rates(0.0)

    def rates(self, rate: float) -> tuple[float, ...]:
        """Of all branches, where the deepest has this one."""
        return rates_of(self._branches, rate, self._options.decay)

    def rated(self, branches: Sequence[Branch]) -> tuple[Branch, ...]:
        """The branches, with the rates that they have without the schedule."""
        return tuple(replace(branch, rate=r) for branch, r in zip(branches, self.rates(self.rate), strict=True))

    def factor(self, step: int) -> float:
        """What the schedule of rates says of an optimizer step.

        Raises:
            ArgumentError: If that is no factor.
        """
        if self._options.rate_schedule is None:
            return 1.0
        factor: object = self._options.rate_schedule(step)
        number = float(factor) if isinstance(factor, Real) else -1.0
        if not 0 <= number <= 1:
            raise ArgumentError(
                f"rate_schedule({step}) returned {factor!r}; it must return a factor on the rate, a number in [0, 1]"
            )
        return number

    def step(self, number: int, replay: Mapping[int, Draw], rate: float | None = None) -> Step:
        """A step, by the number of those before it; `rate` is that of its cycle, None what it would be now."""
        if rate is None:
            rate = self.rate * self.factor(self.schedule.drop_of(number))
        if rate != self._latest[0]:
            self._latest = rate, self.rates(rate)
        phase, cycle = self.schedule.at(number)
        return Step(number, phase if rate else Phase.PLAIN, cycle, self._probes, replay, None, *self._latest)

    def after(self, step: Step) -> Step:
        """The next step, which begins a cycle if it is DROP."""
        number = step.number + 1
        return self.step(number, step.draws(), None if self.schedule.at(number)[0] is Phase.DROP else step.rate)
