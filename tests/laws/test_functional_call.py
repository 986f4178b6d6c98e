"""Fast weights: `torch.func.functional_call` runs the attached model on other tensors, which is no step in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import rdp
from laws import architectures as arch
from laws.strategies import Case
from laws.training import loss

CASES = [
    Case(arch.LoopMLP, (3,), mode="batch", decay="constant", seed=2),
    Case(arch.Transformer, ("pre_norm", 2), mode="row", decay="constant", seed=2),
    Case(arch.ConvNet, ("basic", (1, 2)), mode="batch", decay="constant", seed=2),
    Case(arch.SharedMLP, (2, 2), mode="row", decay="constant", seed=2),
]


def inner_loop(model: nn.Module, fast: dict[str, Tensor], number: int, second_order: bool) -> Tensor:
    """Two steps of MAML, and the loss of the third forward."""
    for k in range(3):
        value = loss(torch.func.functional_call(model, fast, (model.rows(2, 10 * number + k),)))
        if k == 2:
            return value
        gradients = torch.autograd.grad(value, [*fast.values()], create_graph=second_order, allow_unused=True)
        fast = {
            name: p if gradient is None else p - 0.1 * gradient
            for (name, p), gradient in zip(fast.items(), gradients, strict=True)
        }
    raise AssertionError


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("plain_between", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture.__name__)
def test_fast_weights_are_no_false_alarm(case, plain_between, copied, second_order):
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        for number in range(8):
            optimizer.zero_grad()
            fast = {name: p.clone() if copied else p for name, p in model.named_parameters()}
            inner_loop(model, fast, number, second_order).backward()
            if plain_between:
                loss(model(model.rows(2, number))).backward()
            optimizer.step()
    assert handle.check().ok, str(handle.check())
    assert handle.step_count == 8


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture.__name__)
def test_steps_that_are_not_announced_are_told_between_them(case, copied):
    model = case.model()
    case.attach(model, example_inputs=model.rows(2, 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # which is not wrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(8):
            optimizer.zero_grad()
            fast = {name: p.clone() if copied else p for name, p in model.named_parameters()}
            inner_loop(model, fast, number, True).backward()
            loss(model(model.rows(2, number))).backward()
            optimizer.step()
    assert ["no step was announced" in str(w.message) for w in caught if w.category is rdp.RdpWarning] == [True]
