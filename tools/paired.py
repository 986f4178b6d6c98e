"""Student's paired t-test and what goes with it: few seeds, several comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def paired_p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of Student's paired t-test.

    Args:
        differences: of two algorithms on the same seeds; at least two.

    Returns:
        The probability of a mean at least so far from 0 if the algorithms are equal and differences normal.
    """
    n = len(differences)
    spread = statistics.stdev(differences)
    if spread == 0:
        return 1.0 if statistics.fmean(differences) == 0 else 0.0
    return tail(abs(statistics.fmean(differences)) / (spread / math.sqrt(n)), n - 1)


def tail(t: float, freedom: int) -> float:
    """The probability that Student's t of so many degrees of freedom is at least so far from 0.

    Source:
        Abramowitz and Stegun, 26.7.3 and 26.7.4: exact for whole degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - within)


def half_width(differences: Sequence[float], level: float = 0.95) -> float:
    """Half of the width of the confidence interval of a mean.

    Args:
        differences: at least two.
        level: of confidence.
    """
    low, high = 0.0, 1e6  # quantiles of t: the tail falls with t, so they are found by halving
    while high - low > 1e-9 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, len(differences) - 1) > 1 - level else (low, middle)
    return high * statistics.stdev(differences) / math.sqrt(len(differences))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Correct p-values for there being several.

    Returns:
        The corrected ones, at most 1: below a level if Holm's procedure rejects at that level.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected: dict[Key, float] = {}
    largest = 0.0
    for place, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[key]))
        corrected[key] = largest
    return corrected
