"""A branch between its first module and its gate, called as its hooks call it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from internals.rows.hand_made import FOLD, WIDTH, Net, program
from rdp.rows.branch import BranchOnRows, Split

TOTAL = 5
X, MASK, TABLE = torch.randn(TOTAL * FOLD, WIDTH), torch.randn(TOTAL), torch.randn(WIDTH)


def entries(rows: list[int]) -> list[int]:
    return [FOLD * row + i for row in rows for i in range(FOLD)]


class Forward:
    """The model's own forward, with what hooks do in it.

    Args:
        kept: The undropped rows, in the order in which they run.
        freeze: Is it FREEZE?
        x: The input.
        changes: Of the program.
    """

    def __init__(self, kept: list[int], freeze: bool = False, x: Tensor = X, **changes: Any) -> None:
        self.model = Net()
        self.branch = BranchOnRows(self.model, program(**changes))
        self.split = Split(torch.tensor(kept, dtype=torch.int64), torch.tensor(sorted({*range(TOTAL)} - {*kept})))
        self.entered = self.branch.enter(((x,), {}), lambda device: self.split, freeze)

    def middle(self) -> Tensor:
        """What the adding module makes of what the first module returns."""
        assert self.entered is not None
        return torch.tanh(self.model.first(*self.entered[0]) * self.model.gain)

    def second(self, h: Tensor, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the second module."""
        return self.branch.later("second", ((h, MASK), {"table": TABLE, "entries": len(h)} | changes))


def test_the_first_module_gets_the_undropped_rows_in_order():
    forward = Forward([3, 0])
    ((x,), kwargs) = forward.entered
    assert torch.equal(x, X[entries([3, 0])])
    assert kwargs == {}
    assert forward.branch.passing is not None


def test_a_later_module_gets_their_masks_and_all_of_what_all_rows_share():
    forward = Forward([3, 0])
    h = forward.middle()
    (x, mask), kwargs = forward.second(h)
    assert torch.equal(x, h)
    assert torch.equal(mask, MASK[[3, 0]])
    assert kwargs == {"table": TABLE, "entries": 4}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_in_freeze_all_rows_run_and_undropped_ones_without_a_graph(batch_norm):
    """Of them batch normalisation takes the statistics, which are updated in the model's own call."""
    forward = Forward([3, 0], freeze=True, batch_norm=batch_norm)
    args, kwargs = forward.second(forward.middle())
    _, own = forward.model.second(*args, **kwargs)
    assert len(own) == FOLD * (2 if batch_norm else 3)
    others = forward.branch.replay()[4]
    assert own.requires_grad
    assert others.requires_grad is batch_norm
    full = forward.branch.leave(own, others)
    lone = [forward.model.branch(X[entries(rows)], MASK[rows], TABLE) for rows in ([3, 0], [1, 2, 4])]
    torch.testing.assert_close(full[entries([3, 0])], lone[0])
    torch.testing.assert_close(full[entries([1, 2, 4])], lone[1])
    assert forward.branch.passing is None


def test_a_replay_may_end_early():
    forward = Forward([3, 0], freeze=True)
    assert forward.branch.replay(2).keys() == {0, 1, 2}
    assert torch.is_grad_enabled()


def test_in_drop_dropped_rows_are_filled():
    forward = Forward([3, 0])
    kept = torch.ones(2 * FOLD, WIDTH)
    full = forward.branch.leave(kept, None)
    expected = torch.zeros_like(X)
    expected[entries([3, 0])] = 1
    assert torch.equal(full, expected)
    assert forward.branch.passing is None


@pytest.mark.parametrize(("batch_norm", "rows"), [(False, [0]), (True, [0, 1])])
def test_where_no_row_is_left_a_few_run_and_leave_no_mark(batch_norm, rows):
    forward = Forward([], batch_norm=batch_norm)
    ((x,), _) = forward.entered
    assert torch.equal(x, X[entries(rows)])
    args, kwargs = forward.second(forward.middle())
    before = [buffer.clone() for buffer in forward.model.buffers()]
    _, run = forward.model.second(*args, **kwargs)
    assert not all(map(torch.equal, forward.model.buffers(), before))
    assert not forward.branch.leave(run, None).any()
    assert all(map(torch.equal, forward.model.buffers(), before))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_module_that_is_called_in_another_way_gets_all_rows(freeze):
    forward = Forward([3, 0], freeze)
    h = forward.middle()
    (x, mask), kwargs = forward.second(h, table=None)
    assert kwargs == {"table": None, "entries": 2 * 5}, "as many as there are with all rows"
    assert mask is MASK
    torch.testing.assert_close(x[entries([1, 2, 4] if freeze else [3, 0])], h)
    assert x.shape == X.shape
    if freeze:  # otherwise any numbers will do
        expected = torch.tanh(forward.model.first(X[entries([3, 0])]) * forward.model.gain)
        torch.testing.assert_close(x[entries([3, 0])], expected)
        (gradient,) = torch.autograd.grad(x[entries([3, 0])].sum(), forward.model.gain, materialize_grads=True)
        assert not gradient.any()
    assert forward.branch.passing is None


@pytest.mark.parametrize(
    "given",
    [((None,), {}), ((X, None), {}), ((), {"x": X}), ((X[None],), {}), ((X[:, :2],), {}), ((X[: FOLD * 4],), {})],
)
def test_a_first_module_that_is_called_in_another_way_runs_dense(given):
    forward = Forward([3, 0])
    branch = BranchOnRows(forward.model, program())
    assert branch.enter(given, lambda device: forward.split, freeze=False) is None
    assert branch.passing is None


@pytest.mark.parametrize("modules_only", [False, True])
@pytest.mark.parametrize("rows", [TOTAL, TOTAL - 1])
def test_another_shape_is_fine_where_no_function_could_depend_on_it_but_not_other_rows(modules_only, rows):
    operations = program().operations
    wide = torch.randn(rows * FOLD, WIDTH + 1)
    forward = Forward([3, 0], x=wide, operations=(operations[0], operations[3]) if modules_only else operations)
    assert (forward.entered is not None) is (modules_only and rows == TOTAL)


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_replay_is_told_to_hooks_and_forgotten_by_batch_normalisation(batch_norm, error):
    forward, seen = Forward([3, 0], freeze=True, batch_norm=batch_norm), []

    def look(*_: Any) -> None:
        seen.append((forward.branch.replaying, forward.model.second.norm.track_running_stats))
        if error is not None:
            raise error

    forward.second(forward.middle())
    forward.model.second.norm.register_forward_pre_hook(look)
    with nullcontext() if error is None else pytest.raises(RuntimeError, match="out of memory"):
        forward.branch.replay()
    assert seen == [(True, not batch_norm)]
    assert (forward.branch.replaying, forward.model.second.norm.track_running_stats) == (False, True)
