"""The mask stream, number by number: an oracle in plain integers that shares no code with the library.

A run that was saved must draw the same masks when a later version resumes it: the stream is part of what is promised.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

Words = tuple[int, int, int, int]


@functools.cache
def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = high >> 32 ^ c1 ^ k0, high % 2**32, low >> 32 ^ c3 ^ k1, low % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


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

    def number(branch: int, row: int) -> int:
        place, process = (row, rank) if mode == "row" else (0, 0)
        counter = (place // 4, branch + 2**16 * process, micro_batch % 2**32, cycle % 2**32)
        return philox(counter, (seed % 2**32, seed // 2**32))[place % 4]

    def keeps(branch: int, row: int) -> bool:
        if fixed_among is None:
            return number(branch, row) >= round(rates[branch] * 2**32)
        ordered = sorted((number(branch, other), other) for other in range(fixed_among))
        dropped = ordered[: int(rates[branch] * fixed_among + 0.5)]
        return all((number(branch, row), row) > other for other in dropped)

    return [[keeps(branch, row) for row in range(rows)] for branch in range(len(rates))]
