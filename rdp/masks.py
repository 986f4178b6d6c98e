"""Which rows are dropped: pure functions of counters, so that a mask can be drawn again anywhere, at any time.

The generator is Philox4x32-10, a counter-based one: random number i is a hash of i and a key. Nothing is consumed,
the global RNG is never touched, and FREEZE, a recomputed activation checkpoint, a resumed run or another rank get the
same mask by asking for the same counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["row", "batch"]
Decay = Literal["linear", "constant"]
Sampling = Literal["bernoulli", "fixed"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CACHED_WORDS = 2**16


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Hash counters into random words with Philox4x32-10.

    Args:
        counter: `Tensor[..., 4]`, int64, each value in [0, 2**32).
        key: Two words in [0, 2**32).

    Returns:
        `Tensor[..., 4]`, int64: uniform words in [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    even, odd = counter[..., 0::2].clone(), counter[..., 1::2]  # words 0 and 2, which are multiplied, and 1 and 3
    multipliers = torch.tensor(_MULTIPLIERS, device="cpu")
    keys = [[(k + i * step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)] for i in range(_ROUNDS)]
    for round_key in torch.tensor(keys, device="cpu").unbind():
        # int64 products wrap around, but their 64 bits are the right ones: masking after the shift recovers them.
        product = even.mul_(multipliers).flip(-1)
        even = (product >> 32).bitwise_and_(_WORD).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(_WORD)
    return torch.stack((even, odd), dim=-1).flatten(-2)


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

    Entry (b, r) depends on nothing but (seed, cycle, micro_batch, b, r), on `fixed_among` and, in row mode, on rank:
    asking for more rows extends the mask and changes none of it.

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
    blocks, branches = -(-drawn // 4), len(rates)
    # Drawing one mask or sixteen takes about as long, so those of the next cycles are drawn with it.
    cycles = max(min(16, _CACHED_WORDS // (4 * blocks * branches or 1)), 1)
    words = _words(branches, blocks, seed, cycle // cycles * cycles, cycles, micro_batch, rank)[
        cycle % cycles, :, :drawn
    ]
    if fixed_among is None:
        keep = words >= _thresholds(tuple(rates))
    else:
        words = (words << 20) + torch.arange(drawn, device="cpu")  # no two are equal
        dropped = torch.tensor([int(rate * fixed_among + 0.5) for rate in rates], dtype=torch.int64, device="cpu")
        ordered = nn.functional.pad(words[:, :fixed_among].sort(1).values, (1, 0), value=-1)
        keep = words > ordered.gather(1, dropped[:, None])
    return keep[:, :rows] if mode == "row" else keep.expand(-1, rows).clone()


@lru_cache(maxsize=32)
def _words(branches: int, blocks: int, seed: int, first: int, cycles: int, micro_batch: int, rank: int) -> Tensor:
    """Random words, int64 `Tensor[cycles, branches, 4 * blocks]`; do not write to them."""
    shape = (cycles, branches, blocks)
    counter = torch.empty((*shape, 4), dtype=torch.int64, device="cpu")
    counter[..., 0] = torch.arange(blocks, device="cpu")  # one counter yields four words, for four neighbouring rows
    counter[..., 1] = (torch.arange(branches, device="cpu") | (rank << 16))[:, None]
    counter[..., 2] = micro_batch & _WORD
    counter[..., 3] = (torch.arange(first, first + cycles, device="cpu") & _WORD)[:, None, None]
    return philox(counter, (seed & _WORD, seed >> 32)).flatten(2)


@lru_cache(maxsize=32)
def _thresholds(rates: tuple[float, ...]) -> Tensor:
    return torch.tensor([[round(rate * 2**32)] for rate in rates], dtype=torch.int64, device="cpu").view(-1, 1)


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
