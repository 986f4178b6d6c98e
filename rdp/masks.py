"""Which rows are dropped: pure functions of counters, so that a mask can be drawn again anywhere, at any time.

The generator is Philox4x32-10, a counter-based one: random number i is a hash of i and a key. Nothing is consumed,
the global RNG is never touched, and FREEZE, a recomputed activation checkpoint, a resumed run or another rank get the
same mask by asking for the same counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["row", "batch"]
Decay = Literal["linear", "constant"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Hash counters into random words with Philox4x32-10.

    Args:
        counter: `Tensor[..., 4]`, int64, each value in [0, 2**32).
        key: Two words in [0, 2**32).

    Returns:
        `Tensor[..., 4]`, int64: uniform words in [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap around, but their 64 bits are the right ones: masking after the shift recovers them.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _WORD) ^ c1 ^ k0,
            right & _WORD,
            ((left >> 32) & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def draw(
    rates: Sequence[float], rows: int, *, seed: int, cycle: int, micro_batch: int, mode: Mode = "row", rank: int = 0
) -> Tensor:
    """Draw the masks of one model forward, for all branches at once.

    Entry (b, r) depends on nothing but (seed, cycle, micro_batch, b, r) and, in row mode, rank: asking for more rows
    extends the mask and changes none of it.

    Args:
        rates: Drop probability of each branch, in [0, 1).
        rows: Number of rows (samples) N of the forward.
        seed: In [0, 2**64).
        cycle: Number of DROP steps before the one whose masks are drawn.
        micro_batch: Which forward of that step.
        mode: "row" draws one mask a row, "batch" one for all rows of a branch, the same on every rank.
        rank: Process number, so that replicas drop different rows.

    Returns:
        Bool `Tensor[branches, N]` on the CPU; `True` is an undropped row.
    """
    drawn = rows if mode == "row" else 1
    blocks = -(-drawn // 4)  # one counter yields four words, for four neighbouring rows
    branch = torch.arange(len(rates), dtype=torch.int64)[:, None] | ((rank if mode == "row" else 0) << 16)
    block = torch.arange(blocks, dtype=torch.int64)[None, :]
    shape = (len(rates), blocks)
    counter = torch.stack(
        (
            block.expand(shape),
            branch.expand(shape),
            torch.full(shape, micro_batch & _WORD, dtype=torch.int64),
            torch.full(shape, cycle & _WORD, dtype=torch.int64),
        ),
        dim=-1,
    )
    words = philox(counter, (seed & _WORD, seed >> 32)).flatten(1)[:, :drawn]
    threshold = torch.tensor([round(rate * 2**32) for rate in rates], dtype=torch.int64)
    keep = words >= threshold[:, None]
    return keep if mode == "row" else keep.expand(-1, rows).clone()


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
