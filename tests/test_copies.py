"""Copies of an attached model are plain, working models: `deepcopy`, `pickle`, `torch.save`, EMA."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.architectures import BlockMLP, ConvNet
from laws.strategies import Case, cases
from laws.training import identical, loss
from torch import nn

import rdp


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


def shape_of(model: nn.Module) -> dict:
    """Names, classes, flags and attributes of all modules, which any two models of one class share."""
    return {name: (type(m), m.training, list(vars(m))) for name, m in model.named_modules()}


@given(cases(), st.sampled_from(list(COPIES)), st.integers(0, 2), st.booleans())
def test_a_copy_is_a_plain_model_and_drives_nothing(case, how, steps, pending):
    """`pending`: the copy is taken between a forward and its backward, where tensors of the graph are alive."""
    model = case.model()
    handle = case.attach(model)
    for step in range(steps):
        loss(model(model.rows(3, step))).backward()
        handle.advance()
    output = model(model.rows(3, 8)) if pending else None
    before = (handle.state_dict(), handle.step_count, handle.phase)
    model.zero_grad()
    clone = COPIES[how](model)

    plain = case.model()
    plain.load_state_dict(model.state_dict())
    assert shape_of(clone) == shape_of(plain)
    assert identical(dict(clone.state_dict()), dict(model.state_dict()))
    outputs = []
    for net in (clone, plain):
        torch.manual_seed(1)
        outputs.append(net(model.rows(5, 9)))
        loss(outputs[-1]).backward()
    assert identical(*outputs)
    assert identical([p.grad for p in clone.parameters()], [p.grad for p in plain.parameters()])
    assert identical((handle.state_dict(), handle.step_count, handle.phase), before)
    assert all(p.grad is None for p in model.parameters())
    if output is not None:
        loss(output).backward()


@pytest.mark.parametrize("how", list(COPIES))
def test_the_original_still_drops_after_a_copy_and_the_copy_can_be_attached(how):
    case = Case(BlockMLP, (("plain", "plain"),), rate=0.9, decay="constant")
    model, twin = case.model(), case.model()
    case.attach(model)
    case.attach(twin)
    clone = COPIES[how](model)
    x = model.rows(5, 0)
    expected = twin(x)
    assert identical(model(x), expected)
    assert not torch.equal(clone(x), expected)
    handle = case.attach(clone)
    assert identical(clone(x), expected)
    handle.remove()
    assert not torch.equal(clone(x), expected)


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_keeps_neither_the_handle_nor_the_original_alive(how):
    case = Case(BlockMLP, (("plain", "plain"),))
    model = case.model()
    handle = case.attach(model)
    loss(model(model.rows(2, 0))).backward()
    clone = COPIES[how](model)
    alive = weakref.ref(model), weakref.ref(handle)
    del model, handle
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert clone(clone.rows(2, 0)).isfinite().all()


def test_an_exponential_moving_average_follows_a_training_run():
    case = Case(ConvNet, ("basic", (1, 2)), rate=0.5, decay="constant")
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for step in range(3):
        loss(model(model.rows(4, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
    assert handle.step_count == 3
    assert handle.phase is rdp.Phase.FREEZE
    masks = handle.masks.clone()
    assert ema(model.rows(4, 9)).isfinite().all()
    assert torch.equal(handle.masks, masks)
    assert not identical(dict(ema.module.state_dict()), dict(model.state_dict()))


def test_a_copy_of_a_part_is_plain_too():
    case = Case(BlockMLP, (("plain", "plain"),), rate=0.9, decay="constant")
    model = case.model()
    case.attach(model, example_inputs=model.rows(2, 0))
    block = copy.deepcopy(model.body[1])
    x = torch.randn(4, 4, dtype=torch.float64)
    assert torch.equal(block(x), case.model().body[1](x))


def test_state_dicts_load_into_plain_models_and_back():
    case = Case(BlockMLP, (("plain", "norm"),))
    model, plain = case.model(), case.model()
    case.attach(model, example_inputs=model.rows(2, 0))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert plain.load_state_dict(model.state_dict(), strict=True).missing_keys == []
    assert model.load_state_dict(plain.state_dict(), strict=True).unexpected_keys == []
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
