"""Which rows are dropped: pure functions of counters, so that a mask can be drawn again anywhere, at any time.

The generator is SplitMix64, of which number i is a hash of the seed and of i. Nothing is consumed, the global RNG is
never touched, and FREEZE, a recomputed activation checkpoint, a resumed run or another rank get the same mask by asking
for the same numbers. Rates take no part in these: a row is dropped if its number is small enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["row", "batch"]
Decay = Literal["linear", "constant"]
Sampling = Literal["bernoulli", "fixed"]

_WORD = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Of the hash, a shift and a multiplier each: Stafford's variant 13 of the finaliser of MurmurHash3."""
_AT_ONCE = 2**15
"""So many words are made at once; more would not stay in the cache of a processor."""


def split(seed: int, number: int) -> int:
    """Number `number` of SplitMix64: it seeds the generator of a cycle, of a micro-batch in it, of a rank in that.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    word = (seed + (number + 1) * _GAMMA) & _WORD
    for shift, multiplier in _ROUNDS:
        word = (word ^ word >> shift) * multiplier & _WORD
    return word


def numbers(seeds: Sequence[int], branches: range, rows: int) -> Tensor:
    """Random numbers, uniform in [-2**31, 2**31), one a row.

    Rows 2 i and 2 i + 1 of branch b have the low and the high half of `split(seed, b * 2**32 + i)`.

    Args:
        seeds: In [0, 2**64).
        branches: Which ones.
        rows: How many.

    Returns:
        int32 `Tensor[seeds, branches, rows]`.
    """
    gamma = _signed(_GAMMA)
    seed = torch.tensor([_signed(seed + _GAMMA) for seed in seeds], dtype=torch.int64, device="cpu")
    branch = (torch.arange(branches.start, branches.stop, device="cpu") << 32).mul_(gamma)
    word = (seed[:, None] + branch)[:, :, None] + torch.arange(-(-rows // 2), device="cpu").mul_(gamma)
    shifted = torch.empty_like(word)
    for shift, multiplier in _ROUNDS:
        # int64 wraps around as unsigned words do, but its shifts move in copies of the sign.
        word ^= torch.bitwise_right_shift(word, shift, out=shifted).bitwise_and_(_WORD >> shift)
        if multiplier != 1:
            word *= _signed(multiplier)
    return word.view(torch.int32)[..., :rows]


def draw(
    rates: Sequence[float],
    rows: int,
    *,
    seed: int,
    cycle: int,
    micro_batch: int,
    mode: Mode = "row",
    rank: int = 0,
    fixed_among: int | None = None,
) -> Tensor:
    """Draw the masks of one model forward, for all branches at once.

    Entry (b, r) depends on nothing but (seed, cycle, micro_batch, b, r), the rate of branch b, `fixed_among` and, in
    row mode, rank: asking for more rows extends the mask and changes none of it, and a higher rate drops further rows.

    Args:
        rates: Drop probability of each branch, in [0, 1).
        rows: Number of rows (samples) N of the forward.
        seed: In [0, 2**64).
        cycle: Number of DROP steps before the one whose masks are drawn.
        micro_batch: Which forward of that step.
        mode: "row" draws one mask a row, "batch" one for all rows of a branch, the same on every rank.
        rank: Process number, so that replicas drop different rows.
        fixed_among: Of the first `fixed_among` rows of a branch drop exactly `round(rate * fixed_among)`, those with
            the smallest random numbers, and a later row if its number is among theirs. None: every row by itself.

    Returns:
        Bool `Tensor[branches, N]` on the CPU; `True` is an undropped row.
    """
    if mode == "batch":
        rank, drawn = 0, 1
    else:
        drawn = max(rows, fixed_among or 0)
    keep = torch.empty((len(rates), drawn), dtype=torch.bool, device="cpu")
    words = -(-drawn // 2)
    some = max(_AT_ONCE // words, 1)
    # Few masks or many take about as long, so those of the next cycles are drawn with them.
    cycles = max(min(16, _AT_ONCE // (words * len(rates) or 1)), 1)
    first, place = cycle // cycles * cycles, cycle % cycles
    for start in range(0, len(rates), some):
        branches = range(start, min(start + some, len(rates)))
        drops = tuple(rates[start : branches.stop])
        number = _numbers(branches, drawn, seed, range(first, first + cycles), micro_batch, rank)[place]
        if fixed_among is None:
            kept = number >= _thresholds(drops)
        else:
            number = torch.add(torch.arange(drawn, device="cpu"), number, alpha=2**31)  # no two are equal
            kept = number > _largest_dropped(number[:, :fixed_among], drops)
        keep[start : branches.stop] = kept
    return keep[:, :rows] if mode == "row" else keep.expand(-1, rows).clone()


@lru_cache(maxsize=32)
def _numbers(branches: range, rows: int, seed: int, cycles: range, micro_batch: int, rank: int) -> Tensor:
    """Those of some cycles, int32 `Tensor[cycles, branches, rows]`; do not write to them."""
    return numbers([split(split(split(seed, cycle), micro_batch), rank) for cycle in cycles], branches, rows)


@lru_cache(maxsize=32)
def _thresholds(rates: tuple[float, ...]) -> Tensor:
    """The smallest number that is not dropped, int32 `Tensor[branches, 1]`."""
    least = [[min(round(rate * 2**32), 2**32 - 1) - 2**31] for rate in rates]
    return torch.tensor(least, dtype=torch.int32, device="cpu")


def _largest_dropped(number: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Of N numbers the n-th smallest, for n = round(rate * N), int64 `Tensor[branches, 1]`."""
    filler, place = _filler(rates, number.shape[1])
    return torch.cat((number, filler), 1).topk(place, largest=False, sorted=False).values.amax(1, keepdim=True)


@lru_cache(maxsize=32)
def _filler(rates: tuple[float, ...], rows: int) -> tuple[Tensor, int]:
    """Smallest and largest numbers with which `_largest_dropped` looks for the same place in all branches, and it."""
    counts = torch.tensor([fixed_drops(rate, rows) for rate in rates], device="cpu")[:, None]
    most = int(counts.max())
    smallest = torch.arange(most - int(counts.min()) + 1, device="cpu") <= most - counts
    limits = torch.iinfo(torch.int64)
    return torch.where(smallest, limits.min, limits.max), most + 1


def fixed_drops(rate: float, rows: int) -> int:
    """How many of some rows a branch drops, if it drops the same number in each forward."""
    return int(rate * rows + 0.5)


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return (word + 2**63 & _WORD) - 2**63


def branch_rates(depths: Sequence[int], rate: float, decay: Decay) -> list[float]:
    """The drop probability of each branch.

    Args:
        depths: For each branch the position of its block among the model's L blocks, in [0, L); branches of one
            block share one rate, as in timm.
        rate: Drop probability of the deepest block.
        decay: "linear" gives block l the rate `rate * l / (L - 1)` (Huang et al. 2016, and timm), or `rate` where
            there is only one block; "constant" gives every block `rate`.

    Returns:
        One rate a branch.
    """
    deepest = max(depths, default=0)
    if decay == "constant" or deepest == 0:
        return [rate] * len(depths)
    return [rate * depth / deepest for depth in depths]
