"""`rdp.masks`: the generator's published answers, and the statistics of what is drawn from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rdp.masks import branch_rates, draw, philox

SEEDS = st.integers(0, 2**64 - 1)
COUNTS = st.integers(0, 2**32 - 1)
MODES = st.sampled_from(["row", "batch"])
RATES = st.lists(st.floats(0, 0.99), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter, key, words):
    """The vectors of Random123's `kat_vectors` for philox4x32-10."""

    def parse(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    assert philox(torch.tensor(parse(counter)), tuple(parse(key))).tolist() == parse(words)


@given(st.lists(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS), min_size=1, max_size=9), COUNTS, COUNTS)
def test_philox_hashes_each_counter_by_itself(counters, low, high):
    together = philox(torch.tensor(counters), (low, high))
    alone = torch.stack([philox(torch.tensor(counter), (low, high)) for counter in counters])
    assert torch.equal(together, alone)
    assert together.min() >= 0
    assert together.max() < 2**32


@given(RATES, st.integers(1, 40), st.integers(1, 40), SEEDS, COUNTS, st.integers(0, 99), MODES, st.integers(0, 63))
def test_more_rows_or_branches_extend_a_mask_and_change_none_of_it(
    rates, rows, more, seed, cycle, micro_batch, mode, rank
):
    where = {"seed": seed, "cycle": cycle, "micro_batch": micro_batch, "mode": mode, "rank": rank}
    masks = draw(rates, rows, **where)
    assert masks.dtype == torch.bool
    assert masks.shape == (len(rates), rows)
    assert torch.equal(masks, draw(rates, rows, **where))
    assert torch.equal(masks, draw([*rates, 0.5], rows + more, **where)[:-1, :rows])


@given(RATES, st.integers(1, 40), SEEDS, COUNTS, st.integers(0, 99), st.integers(0, 63))
def test_batch_mode_draws_one_value_a_branch_on_every_rank(rates, rows, seed, cycle, micro_batch, rank):
    where = {"seed": seed, "cycle": cycle, "micro_batch": micro_batch, "mode": "batch"}
    masks = draw(rates, rows, **where, rank=rank)
    assert torch.equal(masks, masks[:, :1].expand(-1, rows))
    assert torch.equal(masks, draw(rates, rows, **where, rank=0))


@given(RATES, SEEDS, COUNTS, MODES)
def test_a_higher_rate_drops_no_fewer_rows_and_rate_zero_none(rates, seed, cycle, mode):
    where = {"seed": seed, "cycle": cycle, "micro_batch": 0, "mode": mode}
    masks = draw(rates, 32, **where)
    assert draw([0.0] * len(rates), 32, **where).all()
    assert not (draw([rate + (1 - rate) / 2 for rate in rates], 32, **where) & ~masks).any()


@given(RATES, st.integers(1, 9), SEEDS)
def test_drawing_leaves_the_global_generator_alone(rates, rows, seed):
    before = torch.get_rng_state()
    draw(rates, rows, seed=seed, cycle=1, micro_batch=2)
    assert torch.equal(before, torch.get_rng_state())


@given(RATES, st.integers(1, 40), st.integers(1, 40), SEEDS, COUNTS, st.integers(0, 99), st.integers(0, 63))
def test_a_fixed_number_of_rows_is_dropped(rates, among, rows, seed, cycle, micro_batch, rank):
    where = {"seed": seed, "cycle": cycle, "micro_batch": micro_batch, "rank": rank, "fixed_among": among}
    masks = draw(rates, among, **where)
    assert (~masks).sum(1).tolist() == [math.floor(rate * among + 0.5) for rate in rates]
    other = draw(rates, rows, **where)  # a batch of another size that replays the draw
    assert other.shape == (len(rates), rows)
    both = min(rows, among)
    assert torch.equal(masks[:, :both], other[:, :both])


def test_of_a_fixed_number_every_row_is_dropped_as_often_and_pairs_of_rows_as_they_should():
    rows, dropped, draws = 10, 3, 4000
    masks = torch.stack([draw([0.3], rows, seed=5, cycle=c, micro_batch=0, fixed_among=rows)[0] for c in range(draws)])
    drops = (~masks).double()
    p = dropped / rows
    assert ((drops.mean(0) - p).abs() < FAR * math.sqrt(p * (1 - p) / draws)).all()
    pair = dropped * (dropped - 1) / (rows * (rows - 1))
    together = (drops.T @ drops / draws)[~torch.eye(rows, dtype=torch.bool)]
    assert ((together - pair).abs() < FAR * math.sqrt(pair * (1 - pair) / draws)).all()


def test_rows_beyond_those_of_a_fixed_draw_are_dropped_at_about_the_rate():
    masks = torch.stack([draw([0.3], 64, seed=5, cycle=c, micro_batch=0, fixed_among=32)[0, 32:] for c in range(500)])
    assert abs((~masks).double().mean().item() - 0.3) < 0.03


def test_masks_are_on_the_cpu_whatever_the_default_device():
    expected = draw([0.5, 0.2], 9, seed=1, cycle=77, micro_batch=1)
    with torch.device("meta"):
        assert torch.equal(draw([0.5, 0.2], 9, seed=1, cycle=77, micro_batch=1), expected)
        assert draw([0.5, 0.2], 9, seed=987, cycle=0, micro_batch=1, fixed_among=4).device.type == "cpu"


# -- statistics, at fixed seeds --------------------------------------------------------------------------------------

RATE = 0.3
FAR = 4.5  # standard deviations: 7e-6 two-sided, for a handful of tests at fixed seeds


def chi_square_z(drops: torch.Tensor, draws: int, rate: float) -> float:
    """How many standard deviations the chi-square of binomial counts lies from its mean, by Wilson and Hilferty."""
    n = drops.numel()
    statistic = ((drops.double() - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum().item()
    return ((statistic / n) ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))


def correlation_z(a: torch.Tensor, b: torch.Tensor, rate: float) -> float:
    """The covariance of two drop indicators of known rate, in standard deviations of independent ones."""
    x, y = ((~t).double().flatten() - rate for t in (a, b))
    return ((x * y).sum() / (rate * (1 - rate) * math.sqrt(x.numel()))).item()


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    """Bool `Tensor[cycles, micro_batches, branches, rows]`."""
    return torch.stack(
        [
            torch.stack([draw([RATE] * 8, 64, seed=7, cycle=cycle, micro_batch=k) for k in range(4)])
            for cycle in range(100)
        ]
    )


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9, 0.999])
def test_the_marginal_rate_of_each_branch(rate):
    masks = torch.stack([draw([rate] * 8, 1000, seed=3, cycle=cycle, micro_batch=0) for cycle in range(50)])
    drops = (~masks).sum((0, 2))
    assert abs(chi_square_z(drops, 50 * 1000, rate)) < FAR


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["cycle", "micro_batch", "branch", "row"])
def test_the_marginal_rate_along_every_axis(stream, axis):
    others = [a for a in range(4) if a != axis]
    drops = (~stream).sum(others)
    assert abs(chi_square_z(drops, stream.numel() // stream.shape[axis], RATE)) < FAR


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["cycle", "micro_batch", "branch", "row"])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_neighbours_along_every_axis_are_independent(stream, axis, lag):
    size = stream.shape[axis] - lag
    assert abs(correlation_z(stream.narrow(axis, 0, size), stream.narrow(axis, lag, size), RATE)) < FAR


def test_all_patterns_of_three_branches_occur_as_often_as_they_should(stream):
    """Pairs may be independent and triples not."""
    a, b, c = stream.transpose(0, 2)[:3].flatten(1)
    pattern = (4 * a + 2 * b + c).bincount(minlength=8).double()
    p = torch.tensor([(1 - RATE) ** bin(i).count("1") * RATE ** (3 - bin(i).count("1")) for i in range(8)])
    expected = p * pattern.sum()
    statistic = ((pattern - expected) ** 2 / expected).sum().item()
    assert statistic < 35.3  # chi-square with 7 degrees of freedom, p = 1e-5


@pytest.mark.parametrize(
    "changed", [{"seed": 8}, {"seed": 7 + 2**32}, {"rank": 1}, {"cycle": 2**31}, {"micro_batch": 9}]
)
def test_another_seed_rank_cycle_or_micro_batch_is_another_independent_mask(changed):
    where = {"seed": 7, "cycle": 0, "micro_batch": 0, "rank": 0}
    a, b = (draw([RATE] * 16, 1000, **w) for w in (where, where | changed))
    assert not torch.equal(a, b)
    assert abs(correlation_z(a, b, RATE)) < FAR


def test_batch_mode_has_the_right_rate_and_independent_branches_and_cycles():
    masks = torch.stack(
        [draw([RATE] * 8, 3, seed=7, cycle=cycle, micro_batch=0, mode="batch")[:, 0] for cycle in range(4000)]
    )
    assert abs(chi_square_z((~masks).sum(0), len(masks), RATE)) < FAR
    for lag in (1, 2, 3):
        assert abs(correlation_z(masks[:-lag], masks[lag:], RATE)) < FAR
        assert abs(correlation_z(masks[:, :-lag], masks[:, lag:], RATE)) < FAR


# -- decay -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.floats(0, 0.99))
def test_linear_decay_is_timms_rule(blocks, rate):
    """timm: `torch.linspace(0, drop_path_rate, depth)`, one rate for both branches of a block."""
    depths = [block for block in range(blocks) for _ in range(2)]
    expected = torch.linspace(0, rate, blocks, dtype=torch.float64) if blocks > 1 else torch.tensor([rate])
    actual = torch.tensor(branch_rates(depths, rate, "linear"), dtype=torch.float64)
    torch.testing.assert_close(actual, expected.double().repeat_interleave(2))


@given(st.lists(st.integers(0, 9), max_size=9), st.floats(0, 0.99))
def test_constant_decay_gives_every_block_the_rate(depths, rate):
    assert branch_rates(depths, rate, "constant") == [rate] * len(depths)
