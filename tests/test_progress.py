"""`rdp.progress`: which masks the forwards of a run have and which branches learn, against a history kept by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rdp
from rdp import Phase, masks
from rdp.branches import Branch
from rdp.phases import Schedule
from rdp.progress import Progress

PAPER = (Phase.DROP, Phase.FREEZE)
SEEDS = st.integers(0, 2**64 - 1)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def progress(*rates: float, inside: tuple[int | None, ...] = (), phases: tuple = PAPER, **options: Any) -> Progress:
    """Of branches `a`, `b`, ... with these rates; `inside[i]` encloses branch i."""
    around = (*inside, *[None] * len(rates))
    branches = [Branch("abcdef"[i], "", "identity", (), rate=rate, inside=around[i]) for i, rate in enumerate(rates)]
    return Progress(Schedule(phases), branches, **{"seed": 7, "mode": "row"} | options)


def step(run: Progress, sizes: list[int], rank: int = 0) -> list[Tensor]:
    """The masks of a step of forwards of these sizes."""
    drawn = [run.begin_forward(rows, rank) for rows in sizes]
    run.advance()
    return drawn


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# -- which masks -----------------------------------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES, st.integers(0, 3), st.sampled_from(["row", "batch"]), st.booleans())
def test_forward_k_of_freeze_has_the_masks_of_forward_k_of_drop(seed, sizes, later, rank, mode, one_draw):
    """Further forwards start over, and those of another size have as many rows of the same masks."""
    run = progress(0.5, 0.3, seed=seed, mode=mode, one_draw=one_draw)
    for cycle in range(3):
        dropped = step(run, sizes, rank)
        replayed = step(run, later, rank)
        for k, (rows, mask) in enumerate(zip([*sizes, *later], [*dropped, *replayed], strict=True)):
            number = 0 if one_draw else k if k < len(sizes) else (k - len(sizes)) % len(sizes)
            where = {"seed": seed, "cycle": cycle, "micro_batch": number, "mode": mode, "rank": rank}
            assert torch.equal(mask, masks.draw([0.5, 0.3], rows, **where))
    assert run.step_count == 6


@given(SIZES)
def test_a_fixed_number_is_counted_among_the_rows_of_the_drop_forward(sizes):
    """A FREEZE forward of another size replays the rows it has, and does not draw among them anew."""
    run = progress(0.5, sampling="fixed")
    dropped = step(run, sizes)
    assert [int((~mask).sum()) for mask in dropped] == [int(0.5 * rows + 0.5) for rows in sizes]
    for rows, mask, again in zip(sizes, dropped, step(run, [rows + 2 for rows in sizes]), strict=True):
        assert torch.equal(again[:, :rows], mask)


def test_with_one_draw_all_forwards_of_freeze_have_that_of_the_first_of_drop():
    run = progress(0.5, sampling="fixed", one_draw=True)
    assert [int((~mask).sum()) for mask in step(run, [4, 8])] == [2, 4]
    expected = masks.draw([0.5], 8, seed=7, cycle=0, micro_batch=0, fixed_among=4)
    assert equal(step(run, [8, 8]), [expected, expected])


def test_a_plain_step_drops_nothing_and_leaves_the_replayed_masks_alone():
    run = progress(0.9, 0.9, phases=(Phase.DROP, Phase.PLAIN, Phase.FREEZE))
    dropped, plain, replayed = (step(run, [4, 3]) for _ in range(3))
    assert [mask.tolist() for mask in plain] == [[[True] * 4] * 2, [[True] * 3] * 2]
    assert all(mask.dtype == torch.bool for mask in plain)
    assert equal(dropped, replayed)
    assert not equal(dropped, plain)


def test_a_forward_that_is_thrown_away_leaves_a_number_that_freeze_replays():
    """Forwards 0 and 2 were learned from; FREEZE replays just these."""
    run = progress(0.5)
    kept = [run.begin_forward(8, gradients=0)]
    run.begin_forward(8, gradients=1)
    run.forget_finished(gradients=0)  # nothing has changed since forward 0 began, so its backward is still to come
    assert run.forwards == 1
    kept.append(run.begin_forward(8, gradients=0))
    assert torch.equal(kept[1], masks.draw([0.5], 8, seed=7, cycle=0, micro_batch=1))
    run.forget_finished(gradients=2)
    assert run.forwards == 0
    assert torch.equal(run.begin_forward(8), masks.draw([0.5], 8, seed=7, cycle=0, micro_batch=0))


def test_numbers_go_on_from_the_highest_that_counts():
    run = progress(0.5)
    run.begin_forward(8, gradients=0)
    second = run.begin_forward(8, gradients=1)
    run.forget_finished(gradients=1)
    third = run.begin_forward(8, gradients=1)
    assert torch.equal(third, masks.draw([0.5], 8, seed=7, cycle=0, micro_batch=2))
    run.advance()
    assert equal(step(run, [8, 8]), [second, third])


def test_counted_forwards_are_put_back_as_copies():
    run = progress(0.5)
    run.begin_forward(4)
    position = run.counted()
    run.begin_forward(4)
    assert len(position) == 1
    run.count(position)
    assert run.forwards == 1
    run.begin_forward(4)
    assert len(position) == 1, "the list that was put back is the caller's"


def test_a_rank_skips_to_a_later_step_of_the_others_and_to_no_other():
    run, other = progress(0.5), progress(0.5)
    drawn = step(other, [4])
    run.begin_forward(9)
    for earlier in (-1, 0):
        run.skip_to(earlier)
        assert (run.step_count, run.forwards) == (0, 1)
    run.skip_to(1)
    assert (run.step_count, run.forwards, run.phase) == (1, 0, Phase.FREEZE)
    assert equal(step(run, [4]), drawn), "forward k has draw k where nothing else is known"


# -- what learns -----------------------------------------------------------------------------------------------------


@given(st.data(), SEEDS, SIZES)
def test_a_branch_learns_if_some_row_reaches_it_through_all_branches_around_it(data, seed, sizes):
    """Enclosing branches may come before or after the enclosed ones, and be enclosed themselves."""
    count = data.draw(st.integers(1, 5))
    order = data.draw(st.permutations(range(count)))
    inside: list[int | None] = [None] * count
    for position, branch in enumerate(order[1:], start=1):
        inside[branch] = data.draw(st.sampled_from([None, *order[:position]]))
    rates = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.8]), min_size=count, max_size=count))
    run = progress(*rates, inside=tuple(inside), seed=seed)
    for phase in PAPER:
        drawn = [run.begin_forward(rows) for rows in sizes]

        def learns(mask: Tensor, branch: int, row: int, phase: Phase = phase) -> bool:
            here = rates[branch] == 0 or bool(mask[branch, row]) == (phase is Phase.DROP)
            return here and (inside[branch] is None or learns(mask, inside[branch], row))

        expected = [
            any(learns(mask, branch, row) for mask in drawn for row in range(mask.shape[1])) for branch in range(count)
        ]
        assert run.live().tolist() == expected
        assert run.live().dtype == torch.bool
        run.advance()


def test_branches_beside_each_other_learn_by_their_own_masks():
    for seed in range(40):
        run = progress(0.5, 0.5, 0.0, seed=seed)
        (keep,) = run.begin_forward(1).T
        assert run.live().tolist() == [*keep[:2].tolist(), True]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_three_nested_branches_the_innermost_needs_all(order):
    """Whichever comes first; the middle one is decided before the inner one asks it."""
    outer, middle, inner = order
    inside: list[int | None] = [None] * 3
    inside[middle], inside[inner] = outer, middle
    live = set()
    for seed in range(40):
        run = progress(0.5, 0.5, 0.5, inside=tuple(inside), seed=seed)
        (keep,) = run.begin_forward(1).T
        assert run.live()[inner] == keep.all()
        assert run.live()[middle] == (keep[outer] and keep[middle])
        live.add(tuple(keep.tolist()))
    assert len(live) == 8, "every combination has occurred"


def test_before_the_first_forward_of_a_step_everything_learns():
    """Whatever moves then was not decided by a mask."""
    run = progress(0.5, 0.5)
    with torch.device("meta"):
        live = run.live()
    assert live.tolist() == [True, True]
    assert live.dtype == torch.bool


def test_masks_and_counts_live_on_the_cpu_whatever_the_default_device():
    arguments = {"phases": (Phase.DROP, Phase.PLAIN)}
    expected = progress(0.5, 0.0, **arguments)
    with torch.device("meta"):
        run = progress(0.5, 0.0, **arguments)
        assert run.masks.device.type == "cpu"
        assert run.masks.shape == (2, 0)
        assert run.masks.dtype == torch.bool
        for _ in range(2):
            assert torch.equal(run.begin_forward(3), expected.begin_forward(3))
            assert torch.equal(run.live(), expected.live())
            run.advance()
            expected.advance()


# -- state -----------------------------------------------------------------------------------------------------------


@given(SIZES, SIZES, st.integers(0, 3), st.integers(0, 2), st.sampled_from(["bernoulli", "fixed"]), st.booleans())
def test_a_loaded_run_continues_as_the_saved_one_also_between_micro_batches(
    sizes, more, rank, steps, sampling, one_draw
):
    run = progress(0.5, 0.3, inside=(1,), sampling=sampling, one_draw=one_draw)
    for _ in range(steps):
        step(run, sizes, rank)
    for rows in more:
        run.begin_forward(rows, rank)
    state = copy.deepcopy(run.state_dict())
    other = progress(0.5, 0.3, inside=(1,), sampling=sampling, one_draw=one_draw, seed=1)
    step(other, [3])
    other.begin_forward(2)
    other.load_state_dict(state, *([rank] if rank else []))
    assert (other.seed, other.step_count, other.forwards) == (run.seed, run.step_count, run.forwards)
    assert torch.equal(other.masks, run.masks)
    assert torch.equal(other.live(), run.live())
    assert str(other.state_dict()) == str(state)
    for _ in range(3):
        assert equal(step(other, sizes, rank), step(run, sizes, rank))


def test_a_rate_may_be_a_whole_number():
    """`attach(rate=0)` gives rates that are no floats."""
    run, other = progress(0, 0), progress(0, 0)
    step(run, [2])
    other.load_state_dict(run.state_dict())
    assert other.step_count == 1


def test_what_is_loaded_is_a_copy_and_forwards_of_a_loaded_state_count_for_no_gradient():
    run, other = progress(0.5), progress(0.5)
    run.begin_forward(4)
    state = run.state_dict()
    other.load_state_dict(state)
    state["masks"].fill_(False)
    assert torch.equal(other.masks, masks.draw([0.5], 4, seed=7, cycle=0, micro_batch=0))
    other.forget_finished(gradients=None)
    assert other.forwards == 1, "it is not known what their gradients were, and None stands for that"
    other.forget_finished(gradients=0)
    assert other.forwards == 0


@pytest.mark.parametrize("known", ["in the state", "here"])
def test_where_branches_are_known_on_one_side_only_the_counters_are_loaded(known):
    """They are found in the first forward; the state may be older than that, or come sooner."""
    some, none = progress(0.5), progress()
    step(some, [2])
    saved, loading = (some, none) if known == "in the state" else (none, some)
    saved.step_count, saved.seed = 5, 3
    saved.begin_forward(2)
    before = loading.masks
    loading.load_state_dict(saved.state_dict())
    assert (loading.step_count, loading.seed, loading.forwards) == (5, 3, 0)
    assert loading.masks is before


DAMAGED = [
    ("branches", "a"), ("branches", ["a", 1]),
    ("rates", 0.5), ("rates", ["0.5"]), ("rates", []),
    ("seed", -1), ("seed", 2**64), ("seed", True), ("seed", 1.0), ("seed", None),
    ("step_count", -1), ("step_count", 2**62), ("step_count", False), ("step_count", "1"),
    ("forwards", None), ("forwards", [1]), ("forwards", [[0, 2]]), ("forwards", [[0, 2, -1]]),
    ("forwards", [[0, 1, 1], [0, 1, None]]), ("forwards", ((0, 1, 1),)), ("forwards", [(0, 1, 1)]),
    ("replayed", 0), ("replayed", [[0, 2, 2]]), ("replayed", [[0, 2**64]]), ("replayed", [[0, True]]),
    ("masks", [[True]]), ("masks", torch.ones(1, 2)), ("masks", torch.ones(1, dtype=torch.bool)),
    ("masks", torch.ones(2, 2, dtype=torch.bool)), ("masks", torch.ones(1, 2, 1, dtype=torch.bool)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), DAMAGED, ids=lambda value: str(value)[:30].replace("\n", " "))
def test_a_damaged_value_is_named_and_nothing_is_loaded(key, value):
    run = progress(0.5)
    state = progress(0.5, seed=9).state_dict() | {"step_count": 3} | {key: value}
    if key == "rates":
        state["branches"], run = ["a"], progress()  # or it would be called another run's
    before = str(run.state_dict())
    with pytest.raises(rdp.StateError) as refused:
        run.load_state_dict(state)
    assert str(refused.value) == f"{key} in the state is damaged: {value!r}. Load another one"
    assert str(run.state_dict()) == before


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 0), ("seed", 2**64 - 1), ("step_count", 0), ("step_count", 2**62 - 1), ("forwards", []),
    ("replayed", [[0, 1], [2**64 - 1, 3]]), ("masks", torch.ones(1, 0, dtype=torch.bool)),
])  # fmt: skip
def test_the_last_sound_values_are_loaded(key, value):
    run = progress(0.5)
    run.load_state_dict(run.state_dict() | {key: value})
    assert str(run.state_dict()[key]) == str(value)


@pytest.mark.parametrize(("change", "key", "there", "here"), [
    ({"phases": (Phase.DROP,)}, "phases", "['drop']", "['drop', 'freeze']"),
    ({"mode": "batch"}, "mode", "'batch'", "'row'"),
    ({"sampling": "fixed"}, "sampling", "'fixed'", "'bernoulli'"),
])  # fmt: skip
def test_the_state_of_a_run_with_other_arguments_is_refused(change, key, there, here):
    with pytest.raises(rdp.StateError) as refused:
        progress(0.5).check(progress(0.5, **change).state_dict())
    assert str(refused.value) == (
        f"the state was saved with other {key} than this handle has: {there} in the state, {here} here. "
        "Attach with the arguments of the saved run"
    )


def test_other_branches_and_rates_are_refused_once_they_are_known_on_both_sides():
    for other, key in ((progress(0.5, 0.5), "branches"), (progress(0.25), "rates")):
        with pytest.raises(rdp.StateError, match=f"with other {key} than"):
            progress(0.5).check(other.state_dict())
        progress().check(other.state_dict())
        other.check(progress().state_dict())
    with pytest.raises(rdp.StateError, match="with other mode than"):  # of another type, though it compares equal
        progress(0.5).check(progress(0.5).state_dict() | {"mode": type("Text", (str,), {})("row")})


def test_what_is_no_state_at_all_is_refused():
    with pytest.raises(rdp.StateError) as refused:
        progress().check([1])
    assert str(refused.value) == "this is no state of a ResidualDropPath handle, but a list"
    with pytest.raises(rdp.StateError) as refused:
        progress().check({"mode": "row", "epoch": 3})
    assert str(refused.value) == (
        "this is no state of a ResidualDropPath handle: it lacks ['branches', 'forwards', 'masks', 'phases', 'rates', "
        "'replayed', 'sampling', 'seed', 'step_count']"
    )


@pytest.mark.parametrize("length", [118, 119])
def test_a_long_value_is_cut_after_120_characters_in_a_message(length):
    value = "x" * length
    shown = repr(value) if length == 118 else repr(value)[:120] + "..."
    with pytest.raises(rdp.StateError) as refused:
        progress(0.5).check(progress(0.5).state_dict() | {"seed": value})
    assert str(refused.value) == f"seed in the state is damaged: {shown}. Load another one"
