"""The arguments of `attach`, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from rdp.errors import ArgumentError
from rdp.masks import Decay, Mode, Sampling
from rdp.phases import Phase, Schedule
from rdp.rate_schedules import RateSchedule
from rdp.rates import check_rate

Freeze = Literal["output", "params"]
Native = Literal["error", "off"]
Compute = Literal["auto", "rows", "ghost", "dense"]
Select = Iterable[str] | Callable[[str, nn.Module], bool] | None

_CHOICES = {
    "mode": Mode,
    "decay": Decay,
    "sampling": Sampling,
    "freeze": Freeze,
    "native": Native,
    "compute": Compute,
}


@dataclass(frozen=True)
class Options:
    """What `attach` was asked for; see there for the meaning.

    Raises:
        ArgumentError: At the first value that cannot be used.
    """

    rate: float
    mode: Mode
    decay: Decay
    sampling: Sampling
    freeze: Freeze
    scale_by_keep: bool
    phases: tuple[Phase, ...]
    branches: Select
    native: Native
    compute: Compute
    seed: int
    verify: bool = True
    rate_schedule: RateSchedule | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if not (self.rate_schedule is None or callable(self.rate_schedule)):
            raise ArgumentError(
                "rate_schedule must be a function of the optimizer step that returns a factor in [0, 1], such as "
                f"rdp.rate_schedules.warmup(1000); got {self.rate_schedule!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ArgumentError(f"seed must be an int in [0, 2**64); got {self.seed!r}")
        for name in ("scale_by_keep", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if not (self.rows is None or isinstance(self.rows, str)):
            raise ArgumentError(f"rows must be the name of an argument of the model's forward; got {self.rows!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                allowed = " or ".join(map(repr, get_args(choices)))
                raise ArgumentError(f"{name} must be {allowed}; got {getattr(self, name)!r}")
        Schedule(self.phases)
        if self.freeze == "params" and self.mode == "row":
            raise ArgumentError(
                "freeze='params' needs mode='batch': with one mask a row, some rows of a batch freeze a parameter "
                "while others train it. Use mode='batch', or freeze='output'"
            )
        if self.sampling == "fixed" and self.mode == "batch":
            raise ArgumentError(
                "sampling='fixed' needs mode='row': it drops a fixed number of rows of each branch, and batch mode "
                "drops all or none. Use mode='row', or sampling='bernoulli'"
            )
        if isinstance(self.branches, str):
            raise ArgumentError(f"branches must be a list of names, not one string; write [{self.branches!r}]")
        if _is_names(self.branches) and not self.branches:
            raise ArgumentError(
                f"branches is {self.branches!r}, which names nothing to gate. Leave it out to gate all that are found, "
                "or use rate=0 for plain training"
            )
        if not (self.branches is None or callable(self.branches) or _is_names(self.branches)):
            raise ArgumentError(
                f"branches must be None, names of modules, or a function of (name, module); got {self.branches!r}"
            )

    @property
    def named(self) -> tuple[str, ...]:
        """The names in `branches`, if it is a list of names."""
        return () if self.branches is None or callable(self.branches) else tuple(self.branches)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)
