"""Law 3 for optimizers that do not skip parameters without a gradient: what is frozen is bit-identical all the same.

Live parameters get what the optimizer gives them without RDP; gradients stay as the user left them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import rdp
from laws import architectures as arch
from laws.strategies import Case, cases, every_architecture
from laws.training import copied, identical, loss, snapshot


class MovesAll(Optimizer):
    """SGD; what it does to a parameter without a gradient is the subclass's business."""

    def __init__(self, params: Any, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    self.without_gradient(p, group)
                else:
                    self.with_gradient(p, p.grad, group)
        return result

    def with_gradient(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(group["momentum"]).add_(gradient)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(buffer, alpha=-group["lr"])

    def without_gradient(self, p: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class Zeros(MovesAll):
    """A missing gradient is one of zeros."""

    def without_gradient(self, p, group):
        p.grad = torch.zeros_like(p)
        self.with_gradient(p, p.grad, group)


class Decays(MovesAll):
    """Weight decay is for all."""

    def without_gradient(self, p, group):
        p.mul_(1 - group["lr"] * group["weight_decay"])


class DecaysUnseen(MovesAll):
    """Writes to `data`, as optimizers of old did, which no version tells."""

    def without_gradient(self, p, group):
        p.data.mul_(1 - group["lr"] * group["weight_decay"])


class Coasts(MovesAll):
    """Momentum goes on, where there is some."""

    def without_gradient(self, p, group):
        if p in self.state:
            p.data.add_(self.state[p]["momentum_buffer"], alpha=-group["lr"])


class Averages(MovesAll):
    """Nothing but the state moves: averages, a history in a list, and a count."""

    def without_gradient(self, p, group):
        state = self.state[p]
        state.setdefault("average", torch.zeros_like(p)).lerp_(p, 0.1)
        state.setdefault("history", []).append(p.clone())
        state["count"] = state.get("count", 0) + 1


KINDS = [Zeros, Decays, DecaysUnseen, Coasts, Averages]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices and the rest, which does not decay."""
    parameters = list(model.parameters())
    matrices, rest = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return [group for group in ({"params": matrices}, {"params": rest, "weight_decay": 0.01}) if group["params"]]


def plain_step(model: nn.Module, optimizer: Optimizer, gradients: dict[str, Tensor | None], live: set[str]) -> None:
    """The oracle: the plain optimizer on the gradients of live parameters, with the others put back by hand."""
    named = dict(model.named_parameters())
    before = snapshot(model, optimizer)
    for name, p in named.items():
        p.grad = gradients[name] if name in live else None
    optimizer.step()
    for name in named.keys() - live:
        value, state = before[name]
        named[name].data.copy_(value)
        optimizer.state.pop(named[name], None)
        if state:
            optimizer.state[named[name]] = state


@every_architecture(kind=Zeros, by_closure=False, set_to_none=True)
@every_architecture(kind=Coasts, by_closure=True, set_to_none=False)
@given(cases(scales=(False,)), st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_frozen_is_bit_identical_under_optimizers_that_move_all(case, kind, by_closure, set_to_none):
    model, twin = case.model(), case.model()
    handle = case.attach(model)
    inner, plain = kind(groups(model)), kind(groups(twin))
    optimizer = handle.wrap(inner)
    for number in range(6):
        phase, gradients = handle.phase, {}

        def backward(number=number, gradients=gradients) -> Tensor:
            optimizer.zero_grad(set_to_none)
            value = loss(model(model.rows(2, number)))
            value.backward()
            gradients.update({name: copied(p.grad) for name, p in model.named_parameters()})
            return value

        if not by_closure:
            backward()
        before = snapshot(model, inner)
        optimizer.step(backward if by_closure else None)
        live = case.live(handle.masks, phase)
        for name, p in model.named_parameters():
            if name not in live:
                assert identical(before[name], snapshot(model, inner)[name]), f"{name} is frozen in {phase} and moved"
                assert identical(p.grad, gradients[name]), "a gradient that the optimizer has filled in stays"
        plain_step(twin, plain, gradients, live)
        assert identical(snapshot(model, inner), snapshot(twin, plain))
        if number == 3:  # a state dict goes through both, and loads into the plain one
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
            plain.load_state_dict(copy.deepcopy(saved))


MODELS = [
    Case(arch.Transformer, ("parallel", 2), mode="batch", decay="constant", seed=3),
    Case(arch.ConvNet, ("basic", (1, 2)), mode="batch", decay="constant", seed=3),
    Case(arch.SharedMLP, (2, 2), mode="batch", decay="constant", seed=3),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_handle_finds_nothing_wrong(case, kind):
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(kind(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(8):
            loss(model(model.rows(2, number))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert handle.check().ok, str(handle.check())


class DecaysLate(Decays):
    """Begins when nobody looks any more."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)

    def without_gradient(self, p, group):
        if self.steps > 12:
            super().without_gradient(p, group)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
def test_one_that_begins_later_is_told_once_and_kept_from_then_on(case):
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(DecaysLate(model.parameters()))
    moved, told = [], []
    for number in range(24):
        loss(model(model.rows(2, number))).backward()
        frozen = set(handle.frozen)
        before = snapshot(model, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [str(warning.message) for warning in caught if warning.category is rdp.RdpWarning]
        after = snapshot(model, optimizer)
        moved += [number for name in frozen if not identical(before[name], after[name])]
        optimizer.zero_grad()
    assert len(told) == 1
    assert told[0].startswith("this DecaysLate has written to ")
    assert len(set(moved)) == 1
    assert min(moved) >= 12
    assert not handle.check().ok, "what has moved stays in the report"


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
def test_one_optimizer_a_parameter_that_steps_in_the_backward_is_refused(case):
    model = case.model()
    handle = case.attach(model)
    optimizers = {p: handle.wrap(torch.optim.SGD([p], lr=0.1, momentum=0.9)) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(rdp.AttachError, match=r"SGD is stepped in a backward.*Wrap one optimizer over all"):
            loss(model(model.rows(2, 0))).backward()
        parameters = dict(model.named_parameters())
        assert all(identical(before[name], p.detach()) for name, p in parameters.items())
        assert handle.step_count == 0
