"""The range of a numeric setting, written where the setting is.

@dataclass(frozen=True)
class Config:
    rate: Annotated[float, Range(0, below=1)] = 0.1

check_ranges(config)  # RunError: "--rate must be at least 0 and below 1, not 1.5"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_origin, get_type_hints

from engine.errors import RunError

LARGEST = 1e30  # of any setting: float32 ends at 3e38, and no run has more of anything


@dataclass(frozen=True)
class Range:
    """The numbers between two limits.

    Args:
        least: the smallest one.
        above: or all larger ones than this.
        most: the largest one.
        below: or all smaller ones than this.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether a number lies within; NaN and infinity never do."""
        return (
            abs(value) <= LARGEST
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Such as "at least 0 and below 1"."""
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)


def ranges(kind: type[Any]) -> Iterator[tuple[str, Range]]:
    """The settings of a dataclass that have a range, with it."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            yield from ((name, mark) for mark in hint.__metadata__ if isinstance(mark, Range))


def check_ranges(config: Any) -> None:
    """Look at every setting that has a range; None, where it is allowed, stands for a default.

    Raises:
        RunError: a setting is outside of its range, named with its value.
    """
    for name, allowed in ranges(type(config)):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            expected = allowed if abs(value) <= LARGEST else f"a number up to {LARGEST:g}"
            raise RunError(f"--{name.replace('_', '-')} must be {expected}, not {value}")
