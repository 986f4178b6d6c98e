"""The mask stream, number by number: a run that was saved must draw the same masks when a later version resumes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rdp import masks
from rdp.masks import draw, philox

RATES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9]), min_size=1, max_size=3)


def word(seed: int, cycle: int, micro_batch: int, rank: int, branch: int, row: int) -> int:
    """The random number of one row of one branch; four neighbouring rows share a counter."""
    counter = torch.tensor([row // 4, branch + 2**16 * rank, micro_batch, cycle])
    return philox(counter, (seed % 2**32, seed // 2**32)).tolist()[row % 4]


@given(
    RATES,
    st.integers(1, 9),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["row", "batch"]),
    st.integers(0, 2**16 - 1),
)
def test_a_row_is_kept_if_its_number_is_not_below_the_rate(rates, rows, seed, cycle, micro_batch, mode, rank):
    mask = draw(rates, rows, seed=seed, cycle=cycle, micro_batch=micro_batch, mode=mode, rank=rank)
    for branch, rate in enumerate(rates):
        for row in range(rows):
            place = (rank, branch, row) if mode == "row" else (0, branch, 0)
            assert mask[branch, row] == (word(seed, cycle, micro_batch, *place) / 2**32 >= rate)


def test_a_number_that_equals_the_rate_is_kept():
    """So that rate 0 drops nothing, not even the number 0."""
    for row in range(4):
        rate = word(3, 0, 0, 0, 0, row) / 2**32
        assert draw([rate], 4, seed=3, cycle=0, micro_batch=0)[0, row]
        assert not draw([rate + 2**-32], 4, seed=3, cycle=0, micro_batch=0)[0, row]


@given(RATES, st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**64 - 1), st.integers(0, 99))
def test_of_a_fixed_number_the_rows_with_the_smallest_numbers_are_dropped(rates, among, rows, seed, cycle):
    mask = draw(rates, rows, seed=seed, cycle=cycle, micro_batch=0, fixed_among=among)
    for branch, rate in enumerate(rates):
        numbers = [word(seed, cycle, 0, 0, branch, row) for row in range(max(among, rows))]
        dropped = sorted(numbers[:among])[: int(rate * among + 0.5)]
        assert mask[branch].tolist() == [not dropped or number > dropped[-1] for number in numbers[:rows]]


@pytest.mark.parametrize(("numbers", "dropped"), [
    ([0, 0, 0, 0], [0, 1]),
    ([2**31 + 3, 2**31 + 2, 2**31 + 1, 2**31], [2, 3]),
    ([2**32 - 1, 0, 2**32 - 2, 5], [1, 3]),
])  # fmt: skip
def test_of_equal_numbers_the_first_row_is_dropped_and_every_bit_counts(monkeypatch, numbers, dropped):
    """Equal numbers come once in some billions, and must not change how many rows are dropped."""
    monkeypatch.setattr(masks, "_words", lambda *_: torch.tensor([numbers] * 2))
    mask = draw([0.0, 0.5], 4, seed=0, cycle=0, micro_batch=0, fixed_among=4)
    assert mask[0].all()
    assert mask[1].tolist() == [row not in dropped for row in range(4)]


@pytest.mark.parametrize("fixed_among", [None, 3])
def test_nothing_is_drawn_on_the_default_device(fixed_among):
    """Also not when nothing has been drawn before."""
    where = {"seed": 5, "cycle": 17, "micro_batch": 2, "fixed_among": fixed_among}
    expected = draw([0.5, 0.2], 9, **where)
    for cached in (masks._words_of_cycles, masks._thresholds):
        cached.cache_clear()
    with torch.device("meta"):
        mask = draw([0.5, 0.2], 9, **where)
    assert torch.equal(mask, expected)
