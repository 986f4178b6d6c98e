"""What is drawn, against an oracle in plain integers, and its statistics. The oracle itself has the published answers.

Replays, resuming and ranks are laws; what is here are the corners that training does not come to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.masks import draw as oracle
from laws.masks import number as one_number
from laws.masks import splitmix

from rdp import masks
from rdp.masks import branch_rates, draw, numbers, split

WORDS = st.integers(0, 2**32 - 1)
RATES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1 - 2**-33]), min_size=1, max_size=3)


@pytest.fixture
def forgetful() -> Iterator[Callable[[], None]]:
    """Forgets what was drawn: when it is called, and before and after the test."""

    def forget() -> None:
        for value in vars(masks).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    forget()
    yield forget
    forget()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62))
def test_a_seed_is_split_as_splitmix_does(seed, number):
    assert split(seed, number) == splitmix(seed, number)


@given(
    RATES,
    st.integers(1, 12),
    st.none() | st.integers(1, 12),
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**64 - 1),
            "cycle": st.one_of(st.integers(0, 40), WORDS, st.integers(2**32, 2**61)),
            "micro_batch": st.one_of(st.integers(0, 3), WORDS),
            "rank": st.integers(0, 2**15),
        }
    ),
    st.sampled_from(["row", "batch"]),
)
def test_masks_are_those_of_the_stream_that_is_promised(rates, rows, among, where, mode):
    where |= {"mode": mode, "fixed_among": among if mode == "row" else None}
    mask = draw(rates, rows, **where)
    assert mask.dtype == torch.bool
    assert mask.tolist() == oracle(rates, rows, **where)


@pytest.mark.parametrize("fixed_among", [None, 1000])
def test_masks_of_a_large_batch_are_drawn_part_by_part_and_without_those_of_the_next_cycles(fixed_among):
    """Where they are more than are made at once."""
    where: dict[str, Any] = {"seed": 3, "cycle": 5, "micro_batch": 0, "fixed_among": fixed_among}
    rates = [0.5] * 70 + [0.1] * 70
    drawn = draw(rates, 1000, **where)
    for branch in (0, 69, 70, 139):
        alone = numbers([split(split(split(3, 5), 0), 0)], range(branch, branch + 1), 1000)[0]
        assert alone[0, -8:].tolist() == [one_number(3, 5, 0, 0, branch, row) for row in range(992, 1000)]
        least = alone.sort().values[0, int(rates[branch] * 1000)] if fixed_among else (rates[branch] - 0.5) * 2**32
        assert torch.equal(drawn[branch], alone[0] >= least)


@given(RATES, RATES, st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_a_higher_rate_drops_further_rows_and_none_fewer(some, others, rows, fixed, cycle):
    where: dict[str, Any] = {"seed": 1, "cycle": cycle, "micro_batch": 0, "fixed_among": rows if fixed else None}
    pairs = [(min(pair), max(pair)) for pair in zip(some, others, strict=False)]
    low, high = (draw(rates, rows, **where) for rates in zip(*pairs, strict=True))
    assert bool((low | ~high).all())


def test_a_number_that_equals_the_rate_is_kept():
    """So that rate 0 drops nothing, not even the number 0."""
    for row in range(4):
        rate = (one_number(3, 0, 0, 0, 0, row) + 2**31) / 2**32
        assert draw([rate], 4, seed=3, cycle=0, micro_batch=0)[0, row]
        assert not draw([rate + 2**-32], 4, seed=3, cycle=0, micro_batch=0)[0, row]


@pytest.mark.parametrize(("numbers", "dropped"), [
    ([0, 0, 0, 0], [0, 1]),
    ([3, 2, 1, 0], [2, 3]),
    ([2**31 - 1, -(2**31), 2**31 - 2, -5], [1, 3]),
])  # fmt: skip
def test_of_equal_numbers_the_first_row_is_dropped_and_every_bit_counts(monkeypatch, forgetful, numbers, dropped):
    """Equal numbers come once in some billions, and must not change how many rows are dropped."""
    drawn = torch.tensor(numbers, dtype=torch.int32)
    monkeypatch.setattr(masks, "numbers", lambda seeds, branches, rows: drawn.expand(len(seeds), len(branches), rows))
    mask = draw([0.0, 0.5], 4, seed=0, cycle=0, micro_batch=0, fixed_among=4)
    assert mask[0].all()
    assert mask[1].tolist() == [row not in dropped for row in range(4)]


@pytest.mark.parametrize("fixed_among", [None, 3])
def test_nothing_is_drawn_on_the_default_device_or_from_the_global_generator(forgetful, fixed_among):
    """Also not when nothing has been drawn before."""
    where: dict[str, Any] = {"seed": 5, "cycle": 17, "micro_batch": 2, "fixed_among": fixed_among}
    expected = draw([0.5, 0.2], 9, **where)
    forgetful()
    before = torch.get_rng_state()
    with torch.device("meta"):
        mask = draw([0.5, 0.2], 9, **where)
    assert torch.equal(mask, expected)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_mask_that_was_given_away_may_be_written_to(mode):
    where: dict[str, Any] = {"seed": 5, "cycle": 3, "micro_batch": 2, "mode": mode}
    mask = draw([0.5, 0.2], 9, **where)
    expected = mask.tolist()
    mask.logical_not_()
    assert draw([0.5, 0.2], 9, **where).tolist() == expected


# -- statistics, at fixed seeds: no two of the counters are one ------------------------------------------------------

RATE = 0.3
FAR = 4.5  # standard deviations: 7e-6 two-sided, for a handful of tests at fixed seeds


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    """Bool `Tensor[ranks, cycles, micro_batches, branches, rows]`."""
    counters = [(rank, cycle, k) for rank in range(3) for cycle in range(32) for k in range(4)]
    drawn = [draw([RATE] * 8, 64, seed=7, cycle=cycle, micro_batch=k, rank=rank) for rank, cycle, k in counters]
    return torch.stack(drawn).view(3, 32, 4, 8, 64)


@pytest.mark.parametrize("axis", range(5), ids=["rank", "cycle", "micro_batch", "branch", "row"])
def test_along_every_axis_the_rate_is_right_and_neighbours_are_independent(stream, axis):
    counts = (~stream).double().movedim(axis, 0).flatten(1).mean(1)
    deviation = math.sqrt(RATE * (1 - RATE) / (stream.numel() // len(counts)))
    assert ((counts - RATE).abs() < FAR * deviation).all()
    for lag in (1, 2):
        size = stream.shape[axis] - lag
        x, y = ((~stream.narrow(axis, start, size)).double() - RATE for start in (0, lag))
        covariance = (x * y).sum() / (RATE * (1 - RATE) * math.sqrt(x.numel()))
        assert abs(covariance) < FAR


def test_of_a_fixed_number_every_row_is_dropped_as_often_and_pairs_of_rows_as_they_should():
    rows, dropped, draws = 10, 3, 2000
    drawn = [draw([0.3], rows, seed=5, cycle=c, micro_batch=0, fixed_among=rows)[0] for c in range(draws)]
    drops = (~torch.stack(drawn)).double()
    assert (drops.sum(1) == dropped).all()
    p, pair = dropped / rows, dropped * (dropped - 1) / (rows * (rows - 1))
    assert ((drops.mean(0) - p).abs() < FAR * math.sqrt(p * (1 - p) / draws)).all()
    together = (drops.T @ drops / draws)[~torch.eye(rows, dtype=torch.bool)]
    assert ((together - pair).abs() < FAR * math.sqrt(pair * (1 - pair) / draws)).all()


def test_rows_beyond_those_of_a_fixed_draw_are_dropped_at_about_the_rate():
    drawn = [draw([0.3], 64, seed=5, cycle=c, micro_batch=0, fixed_among=32)[0, 32:] for c in range(300)]
    assert abs((~torch.stack(drawn)).double().mean().item() - 0.3) < 0.03


# -- decay -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.floats(0, 0.99))
def test_linear_decay_is_timms_rule(blocks, rate):
    """timm: `torch.linspace(0, drop_path_rate, depth)`, one rate for both branches of a block."""
    depths = [block for block in range(blocks) for _ in range(2)]
    expected = torch.linspace(0, rate, blocks, dtype=torch.float64) if blocks > 1 else torch.tensor([rate])
    actual = torch.tensor(branch_rates(depths, rate, "linear"), dtype=torch.float64)
    torch.testing.assert_close(actual, expected.double().repeat_interleave(2))


def test_without_branches_there_are_no_rates():
    assert branch_rates([], 0.5, "linear") == branch_rates([], 0.5, "constant") == []
