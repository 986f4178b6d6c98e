"""Law 2: FREEZE replays the masks of DROP, whatever its batch sizes and number of micro-batches."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rdp
from laws.architectures import LoopMLP
from laws.masks import draw
from laws.strategies import Case, batch_sizes, cases


def run_step(model, handle, sizes: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    """The masks of each micro-batch of one optimizer step."""
    masks = []
    for k, size in enumerate(sizes):
        model(model.rows(size, seed + k)).sum().backward()
        masks.append(handle.masks.clone())
        assert masks[-1].shape == (len(model.blocks), size)
        assert masks[-1].dtype == torch.bool
    handle.advance()
    return masks


def attached(case: Case):
    model = case.model()
    return model, case.attach(model)


@given(cases(), batch_sizes(), batch_sizes(), st.integers(0, 3))
def test_row_i_of_micro_batch_k_keeps_its_mask(case, drop_sizes, freeze_sizes, cycle):
    """More micro-batches than DROP had begin again at its first."""
    model, handle = attached(case)
    for _ in range(2 * cycle):
        run_step(model, handle, [2])
    dropped = run_step(model, handle, drop_sizes)
    assert handle.phase is rdp.Phase.FREEZE
    for k, replayed in enumerate(run_step(model, handle, freeze_sizes)):
        recorded = dropped[k % len(dropped)]
        rows = min(recorded.shape[1], replayed.shape[1])
        assert torch.equal(recorded[:, :rows], replayed[:, :rows])


@given(cases(), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
def test_rows_beyond_are_what_drop_would_have_drawn(case, sizes):
    case = replace(case, sampling="bernoulli")  # a fixed number of rows is one of the rows that DROP had
    drop_sizes, freeze_sizes = zip(*sizes, strict=True)
    model, handle = attached(case)
    run_step(model, handle, drop_sizes)
    replayed = run_step(model, handle, freeze_sizes)
    twin, twin_handle = attached(case)
    assert all(map(torch.equal, replayed, run_step(twin, twin_handle, freeze_sizes)))


@given(cases(), st.lists(batch_sizes(), min_size=1, max_size=4))
def test_masks_are_the_pure_function_of_the_counters(case, steps):
    model, handle = attached(case)
    for step, sizes in enumerate(steps):
        micro_batches = len(steps[step - step % 2])  # of DROP
        for k, masks in enumerate(run_step(model, handle, sizes)):
            # with freeze="params" all micro-batches of a step must agree on what is frozen
            number = 0 if case.freeze == "params" else k % micro_batches
            where = {"seed": case.seed, "cycle": step // 2, "micro_batch": number, "mode": case.mode, "rank": 0}
            where["fixed_among"] = steps[step - step % 2][number] if case.sampling == "fixed" else None
            assert masks.tolist() == draw(case.rates, masks.shape[1], **where)


@given(cases(), batch_sizes())
def test_evaluation_and_paused_forwards_within_a_step_move_nothing(case, sizes):
    model, handle = attached(case)
    twin, twin_handle = attached(case)
    expected = run_step(twin, twin_handle, sizes) + run_step(twin, twin_handle, sizes)
    actual = []
    for _ in range(2):
        for k, size in enumerate(sizes):
            model.eval()(model.rows(3, 9))
            with handle.paused():
                model.train()(model.rows(4, 9))
            model(model.rows(size, k)).sum().backward()
            actual.append(handle.masks.clone())
        handle.advance()
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_successive_cycles_differ(mode):
    model, handle = attached(Case(LoopMLP, (3,), mode=mode, decay="constant"))
    masks = [run_step(model, handle, [6])[0] for _ in range(40)]
    assert all(map(torch.equal, masks[::2], masks[1::2]))
    assert len({tuple(m.flatten().tolist()) for m in masks}) > 4
