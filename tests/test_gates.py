"""`rdp.gates`: what a gate does to a branch output and its gradient, against Algorithm 1 written out row by row."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.test_mixed_precision import record_dtypes
from laws.training import loss
from torch import Tensor, nn

import rdp
from rdp.gates import (
    broadcast_rows,
    drop_block,
    drop_rows,
    freeze_block,
    freeze_rows,
    link,
    replace_leaf,
    rescale,
)

MASKS = st.lists(st.booleans(), min_size=1, max_size=6).map(torch.tensor)


def rows(keep: Tensor, seed: int) -> Tensor:
    """Float64 `Tensor[N, 3]` that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(keep), 3, generator=generator, dtype=torch.float64, requires_grad=True)


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a sum in which every entry has another weight."""
    weights = torch.arange(1.0, output.numel() + 1, dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), inputs, materialize_grads=True))


@given(MASKS, st.sampled_from([None, 0.3, 0.75]))
def test_drop_is_a_product_with_the_mask(keep, keep_prob):
    x, twin = rows(keep, 0), rows(keep, 0)
    output = drop_rows(x, keep[:, None], keep_prob)
    expected = twin * (keep[:, None] / (keep_prob or 1.0))
    torch.testing.assert_close([output, *gradients(output, x)], [expected, *gradients(expected, twin)])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_drop_selects_dropped_rows_away_where_a_product_would_give_nan(value):
    x = torch.tensor([[1.0], [value]], requires_grad=True)
    output = drop_rows(x, torch.tensor([[True], [False]]))
    assert output.tolist() == [[1.0], [0.0]]
    assert gradients(output, x)[0].tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.floats(0.01, 1.0))
def test_undropped_rows_are_rescaled_to_the_bit_as_by_timm(dtype, keep_prob):
    """`timm.layers.drop_path(scale_by_keep=True)` multiplies by a tensor of ones that it divides, in the dtype of x."""
    x = torch.linspace(-3, 3, 50, dtype=dtype)
    assert torch.equal(rescale(x, keep_prob), x * torch.ones(50, dtype=dtype).div_(keep_prob))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_by_keep", [False, True])
def test_under_autocast_no_module_returns_another_dtype(mode, dtype, scale_by_keep):
    case = Case(
        BlockMLP, (("plain", "norm"),), mode=mode, decay="constant", scale_by_keep=scale_by_keep, dtype=torch.float32
    )
    plain, model = case.model(), case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    seen = [record_dtypes(net) for net in (plain, model)]
    for step in range(6):
        for net in (plain, model):
            with torch.autocast("cpu", dtype=dtype):
                output = net(net.rows(4, step))
            assert output.dtype == dtype
            loss(output.float()).backward()
        handle.advance()
    assert seen[0] == seen[1]


@given(MASKS)
def test_freeze_keeps_the_value_and_stops_the_gradient_of_undropped_rows(keep):
    x, twin = rows(keep, 0), rows(keep, 0)
    m = keep[:, None].double()
    output, expected = freeze_rows(x, keep[:, None]), m * twin.detach() + (1 - m) * twin
    assert torch.equal(output, x)
    torch.testing.assert_close(gradients(output, x), gradients(expected, twin))


@given(MASKS, st.sampled_from(["DROP", "FREEZE"]))
def test_a_gated_block_equals_its_sum_written_out(keep, phase):
    """`out = x + f(x)`, of which f is not seen, is masked as if the mask stood before the sum."""
    x, f, twin_x, twin_f = rows(keep, 0), rows(keep, 1), rows(keep, 0), rows(keep, 1)
    m = keep[:, None].double()
    if phase == "DROP":
        output, expected = drop_block(x + f, x, keep[:, None]), twin_x + m * twin_f
    else:
        output = freeze_block(x + f, x, keep[:, None])
        expected = twin_x + m * twin_f.detach() + (1 - m) * twin_f
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, x, f), gradients(expected, twin_x, twin_f))


@given(MASKS, st.integers(1, 3), st.integers(0, 2))
def test_entry_r_times_fold_plus_i_belongs_to_row_r(keep, fold, axis):
    shape = [2, 3, 4]
    shape[axis] = len(keep) * fold
    mask = broadcast_rows(keep, torch.zeros(shape), axis, "block")
    entries = mask.expand(shape).movedim(axis, 0)
    for row, kept in enumerate(keep.tolist()):
        for i in range(fold):
            assert bool(entries[row * fold + i].all() if kept else not entries[row * fold + i].any())


def test_an_axis_that_does_not_hold_the_rows_is_refused():
    with pytest.raises(rdp.ForwardError) as refused:
        broadcast_rows(torch.ones(3, dtype=torch.bool), torch.zeros(2, 7), 1, "layer.0")
    assert str(refused.value) == (
        "the output of `layer.0` has shape (2, 7), whose axis 1 should hold the 3 rows of the batch; its layout "
        "differs from the forward in which branches were found. Remove the handle and attach again with example_inputs "
        "of the present form, or use mode='batch'"
    )


def test_link_changes_nothing_but_that_the_others_have_a_gradient_of_zero():
    x = torch.randn(4, requires_grad=True)
    others = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.full((5,), math.nan))]
    linked = link(x, others)
    assert torch.equal(linked, x)
    with torch.no_grad():
        others[0].mul_(2)  # as the optimizer of another model does between forward and backward
    linked.mul_(3)  # a view of x would forbid it
    x_gradient, *rest = torch.autograd.grad(linked.sum(), [x, *others])
    assert x_gradient.tolist() == [3.0] * 4
    assert [gradient.tolist() for gradient in rest] == [torch.zeros(2, 3).tolist(), torch.zeros(5).tolist()]


class Pair(NamedTuple):
    """What some models return."""

    first: object
    second: object


@dataclasses.dataclass
class Output:
    """What others return."""

    logits: Tensor
    extra: object = None


def leaves(value: object) -> list[Tensor]:
    """The tensors of a nested container, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in leaves(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in leaves(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [tensor for item in vars(value).values() for tensor in leaves(item)]
    return []


def shape(value: object) -> object:
    """The container, with its types, in which every tensor is a dot."""
    if isinstance(value, Tensor):
        return "."
    if isinstance(value, dict):
        return type(value), [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), [shape(item) for item in vars(value).values()]
    return value


OUTPUTS = st.recursive(
    st.one_of(st.builds(torch.zeros, st.just(1)), st.sampled_from([None, "text", 3, Output, Pair])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Output, st.builds(torch.zeros, st.just(1)), inner),
    ),
    max_leaves=6,
)


@given(OUTPUTS, st.data())
def test_one_tensor_of_a_nested_output_is_replaced_and_nothing_else(output, data):
    before = leaves(output)
    leaf = data.draw(st.integers(0, len(before)))  # the last stands for no tensor at all
    new = torch.ones(2)
    replaced = replace_leaf(output, leaf, new)
    assert shape(replaced) == shape(output)
    assert [id(tensor) for tensor in leaves(replaced)] == [
        id(new if position == leaf else tensor) for position, tensor in enumerate(before)
    ]
    assert [id(tensor) for tensor in leaves(output)] == list(map(id, before)), "the output itself is left alone"


@pytest.mark.parametrize("around", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}, lambda x: {x}, Output])
def test_what_holds_the_replaced_tensor_is_new_and_what_holds_others_is_the_same(around):
    first, second = around(torch.zeros(1)), around(torch.zeros(1))
    new = torch.ones(2)
    replaced, kept = replace_leaf((first, second), 0, new)
    assert kept is second
    assert replaced is not first
    assert type(replaced) is type(first)
    held = vars(replaced) if isinstance(replaced, Output) else replaced
    assert any(item is new for item in (held.values() if isinstance(held, dict) else held))


@dataclasses.dataclass
class Partial:
    logits: Tensor
    loss: Tensor = dataclasses.field(init=False)


def test_fields_that_have_no_value_stay_without_one():
    replaced = replace_leaf(Partial(torch.zeros(2)), 0, torch.ones(2))
    assert torch.equal(replaced.logits, torch.ones(2))
    assert not hasattr(replaced, "loss")
