"""The mask stream, number by number: an oracle in plain integers that shares no code with the library.

A run that was saved must draw the same masks when a later version resumes it: the stream is part of what is promised.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence


@functools.cache
def splitmix(seed: int, number: int) -> int:
    """Number `number` of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    word = (seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def number(seed: int, cycle: int, micro_batch: int, rank: int, branch: int, row: int) -> int:
    """The number of a row, in [-2**31, 2**31): half a word of a generator that is seeded by another three times."""
    for place in (cycle, micro_batch, rank):
        seed = splitmix(seed, place)
    word = splitmix(seed, branch * 2**32 + row // 2)
    half = word // 2**32 if row % 2 else word % 2**32
    return (half + 2**31) % 2**32 - 2**31


def draw(
    rates: Sequence[float],
    rows: int,
    *,
    seed: int,
    cycle: int,
    micro_batch: int,
    mode: str = "row",
    rank: int = 0,
    fixed_among: int | None = None,
) -> list[list[bool]]:
    """The masks of one forward, `[branch][row]`; `True` is an undropped row.

    Args:
        rates: drop probability of each branch.
        rows: of the forward.
        seed: of the handle.
        cycle: how many DROP steps came before the one whose masks these are.
        micro_batch: which forward of that step.
        mode: "row", or "batch", where all rows on all ranks have the number of row 0 on rank 0.
        rank: of the process.
        fixed_among: with `sampling="fixed"`, how many rows the forward of DROP had; of these, those with the smallest
            numbers are dropped, the first of equal ones, and later rows with a smaller number than one of them.
    """

    def drawn(branch: int, row: int) -> int:
        return number(seed, cycle, micro_batch, *((rank, branch, row) if mode == "row" else (0, branch, 0)))

    def keeps(branch: int, row: int) -> bool:
        if fixed_among is None:
            return drawn(branch, row) + 2**31 >= min(round(rates[branch] * 2**32), 2**32 - 1)
        ordered = sorted((drawn(branch, other), other) for other in range(fixed_among))
        dropped = ordered[: int(rates[branch] * fixed_among + 0.5)]
        return all((drawn(branch, row), row) > other for other in dropped)

    return [[keeps(branch, row) for row in range(rows)] for branch in range(len(rates))]
