"""What a gate does to a branch output and its gradient, against Algorithm 1 written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rdp
from rdp import Phase
from rdp.branches import GatePoint, RowAxis
from rdp.training.gates import broadcast_rows, gate, link_output, undropped

MASKS = st.lists(st.booleans(), min_size=1, max_size=6).map(torch.tensor)
GATED = st.sampled_from([Phase.DROP, Phase.FREEZE])
KEEP_PROBS = st.sampled_from([None, 0.3, 0.75])


def rows(count: int, seed: int) -> Tensor:
    """Float64 `Tensor[count, 3]` that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64, requires_grad=True)


def value_and_gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of a sum in which every entry has another weight."""
    weights = torch.arange(1.0, output.numel() + 1, dtype=output.dtype).view_as(output)
    total = (output * weights).sum() + sum(0 * x.sum() for x in inputs)
    return [output.detach(), *torch.autograd.grad(total, inputs)]


def by_algorithm_1(phase: Phase, keep: Tensor, x: Tensor, keep_prob: float | None) -> Tensor:
    m = keep[:, None].double()
    return m / (keep_prob or 1) * x if phase is Phase.DROP else m * x.detach() + (1 - m) * x


@given(MASKS, GATED, KEEP_PROBS)
def test_a_branch_is_gated_row_by_row_as_the_algorithm_says(keep, phase, keep_prob):
    x, twin = rows(len(keep), 0), rows(len(keep), 0)
    output, expected = gate(phase, keep[:, None], x, None, keep_prob), by_algorithm_1(phase, keep, twin, keep_prob)
    torch.testing.assert_close(value_and_gradients(output, x), value_and_gradients(expected, twin))
    if phase is Phase.FREEZE:
        assert torch.equal(output, x)


@given(MASKS, GATED)
def test_a_gated_block_equals_its_sum_written_out(keep, phase):
    """`out = x + f(x)`, of which f is not seen, is masked as if the mask stood before the sum."""
    (x, f), (twin_x, twin_f) = ([rows(len(keep), 0), rows(len(keep), 1)] for _ in range(2))
    output = gate(phase, keep[:, None], x + f, x)
    expected = twin_x + by_algorithm_1(phase, keep, twin_f, None)
    torch.testing.assert_close(value_and_gradients(output, x, f), value_and_gradients(expected, twin_x, twin_f))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("phase", [Phase.DROP, Phase.FREEZE])
@pytest.mark.parametrize(("of_block", "keep_prob"), [(False, None), (False, 0.25), (True, None)])
def test_rows_that_are_all_alike_are_gated_as_each_of_them_is(keep, phase, of_block, keep_prob):
    ends = []
    for mask in (keep, torch.full((3, 1), keep)):
        x, source = rows(3, 0), rows(3, 1)
        output = gate(phase, mask, x, source if of_block else None, keep_prob)
        ends.append(value_and_gradients(output, x, source))
    torch.testing.assert_close(*ends)


def test_where_all_rows_are_alike_nothing_is_computed_for_nothing():
    """What is dropped leaves no graph behind, nor does what is frozen; and what stays as it is is not copied."""
    x = rows(3, 0)
    assert not gate(Phase.DROP, False, x).requires_grad
    assert not gate(Phase.FREEZE, True, x).requires_grad
    assert gate(Phase.DROP, True, x) is x
    assert gate(Phase.FREEZE, False, x) is x


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_dropped_rows_are_selected_away_where_a_product_would_give_nan(value):
    x = torch.tensor([[1.0], [value]], requires_grad=True)
    output = gate(Phase.DROP, torch.tensor([[True], [False]]), x)
    assert output.tolist() == [[1.0], [0.0]]
    assert torch.autograd.grad(output.sum(), x)[0].tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.floats(0.01, 1.0))
def test_undropped_rows_are_rescaled_to_the_bit_as_by_timm(dtype, keep_prob):
    """`timm.layers.drop_path(scale_by_keep=True)` multiplies by a tensor of ones that it divides, in the dtype of x."""
    x = torch.linspace(-3, 3, 50, dtype=dtype)
    assert torch.equal(undropped(Phase.DROP, x, None, keep_prob), x * torch.ones(50, dtype=dtype).div_(keep_prob))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_block_returns_its_input_in_the_dtype_of_its_output_and_a_copy_of_it(dtype):
    """The model may write into what the block returns, but must not write into what it takes."""
    source = torch.randn(3, 4)
    output = gate(Phase.DROP, False, torch.randn(3, 4, dtype=dtype), source)
    assert output.dtype == dtype
    assert torch.equal(output, source.to(dtype))
    assert output.data_ptr() != source.data_ptr()


@given(MASKS, st.integers(1, 3), st.integers(0, 2))
def test_entry_r_times_fold_plus_i_belongs_to_row_r(keep, fold, axis):
    shape = [2, 3, 4]
    shape[axis] = len(keep) * fold
    mask = broadcast_rows(keep, torch.zeros(shape), GatePoint("block", 0, RowAxis(axis, fold)))
    entries = mask.expand(shape).movedim(axis, 0)
    for row, kept in enumerate(keep.tolist()):
        for i in range(fold):
            assert bool(entries[row * fold + i].all() if kept else not entries[row * fold + i].any())


@pytest.mark.parametrize("keep", [True, False])
def test_without_a_row_axis_all_entries_have_the_mask_that_all_rows_have(keep):
    mask = broadcast_rows(torch.full((3,), keep), torch.zeros(5, 4), GatePoint("block", 0, None))
    assert mask.expand(5, 4).tolist() == [[keep] * 4] * 5


def test_an_axis_that_does_not_hold_the_rows_is_refused():
    with pytest.raises(rdp.ForwardError) as refused:
        broadcast_rows(torch.ones(3, dtype=torch.bool), torch.zeros(2, 7), GatePoint("layer.0", 0, RowAxis(1)))
    assert str(refused.value) == (
        "the output of `layer.0` has shape (2, 7), whose axis 1 should hold the 3 rows of the batch; its layout "
        "differs from the forward in which branches were found. Remove the handle and attach again with example_inputs "
        "of the present form, or use mode='batch'"
    )


# -- the end of a forward ---------------------------------------------------------------------------------------------


def test_a_link_changes_nothing_but_that_the_others_have_a_gradient_of_zero():
    x = torch.randn(4, requires_grad=True)
    others = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.full((5,), math.nan))]
    linked = link_output(x, others)
    assert torch.equal(linked, x)
    with torch.no_grad():
        others[0].mul_(2)  # as the optimizer of another model does between forward and backward
    linked.mul_(3)  # a view of x would forbid it
    x_gradient, *rest = torch.autograd.grad(linked.sum(), [x, *others])
    assert x_gradient.tolist() == [3.0] * 4
    assert [gradient.tolist() for gradient in rest] == [torch.zeros(2, 3).tolist(), torch.zeros(5).tolist()]


def linked(output: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """The output with a parameter linked to it, and the keys of what was changed."""
    new = link_output(output, [nn.Parameter(torch.zeros(2))])
    return new, [key for key in output if new[key] is not output[key]]


def test_of_several_outputs_the_first_that_has_a_graph_is_linked():
    x = torch.zeros(2, requires_grad=True)
    output = {"ids": torch.arange(2), "constant": torch.ones(2), "first": x * 2, "second": x * 3, "text": "text"}
    new, changed = linked(output)
    assert changed == ["first"]
    assert new["first"].requires_grad


def test_where_no_output_has_a_graph_all_that_can_have_one_are_linked():
    """Any of them may be what the loss is made of."""
    output = {"ids": torch.arange(2), "first": torch.ones(2), "second": torch.ones(3)}
    new, changed = linked(output)
    assert changed == ["first", "second"]
    assert [new[key].requires_grad for key in output] == [False, True, True]
    assert [new[key].tolist() for key in output] == [output[key].tolist() for key in output]
