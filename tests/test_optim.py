"""`rdp.MaskedOptimizer`: everything a training loop does with an optimizer it can do with the wrapped one."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from laws.architectures import BlockMLP, LoopMLP
from laws.strategies import Case
from laws.training import Spy, identical, loss, snapshot
from torch import nn

import rdp

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), mode="batch", decay="constant", seed=3)


def setup(cls: type = torch.optim.AdamW, case: Case = CASE, **options):
    model = case.model()
    handle = case.attach(model)
    inner = cls(model.parameters(), **{"lr": 0.1} | options)
    return model, handle, inner, handle.wrap(inner)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model(model.rows(4, step))).backward()
        optimizer.step()


def test_it_is_an_optimizer_that_shares_everything_with_the_wrapped_one():
    model, _, inner, optimizer = setup()
    train(model, optimizer, 2)
    assert isinstance(optimizer, rdp.MaskedOptimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    inner.load_state_dict(inner.state_dict())  # replaces the containers of the inner optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert "AdamW" in repr(optimizer)


def test_a_group_added_later_is_trained():
    model, _, inner, optimizer = setup(torch.optim.SGD)
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert inner.param_groups[1]["params"] == [extra]
    (loss(model(model.rows(4, 0))) + extra.sum()).backward()
    optimizer.step()
    assert extra.tolist() == [-1.0, -1.0]


def test_checkpoints_interchange_with_an_unwrapped_run():
    model, _, inner, optimizer = setup()
    train(model, optimizer, 3)
    assert identical(optimizer.state_dict(), inner.state_dict())
    plain = torch.optim.AdamW(CASE.model().parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    _, _, other, wrapped = setup()
    wrapped.load_state_dict(plain.state_dict())
    assert identical(other.state_dict(), optimizer.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert identical(torch.load(file, weights_only=True), inner.state_dict())


def test_step_advances_the_phase_and_returns_what_the_inner_step_returns():
    model, handle, _, optimizer = setup(torch.optim.SGD)
    assert (handle.phase, handle.step_count) == (rdp.Phase.DROP, 0)
    loss(model(model.rows(4, 0))).backward()
    assert optimizer.step() is None
    assert (handle.phase, handle.step_count) == (rdp.Phase.FREEZE, 1)
    train(model, optimizer, 1)
    assert (handle.phase, handle.step_count) == (rdp.Phase.DROP, 2)


def test_a_closure_sees_the_same_training_as_a_loop():
    ends = []
    for use_closure in (False, True):
        model, _, inner, optimizer = setup(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
        for step in range(8):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                value = loss(model(model.rows(4, step)))
                value.backward()
                return value

            if use_closure:
                assert optimizer.step(closure).requires_grad
            else:
                closure()
                optimizer.step()
        ends.append(snapshot(model, inner))
    assert identical(*ends)


def test_lbfgs_leaves_frozen_parameters_alone():
    """It has one state for all parameters, and its direction moves those of zero gradient too."""
    model, handle, _, optimizer = setup(torch.optim.LBFGS, max_iter=3)
    frozen = 0
    for step in range(8):
        x = model.rows(4, step)
        live, phase = set(), handle.phase

        def closure(x=x, live=live, phase=phase):
            optimizer.zero_grad()
            value = model(x).square().sum()
            value.backward()
            live |= CASE.live(handle.masks, phase)
            return value

        before = copy.deepcopy(dict(model.named_parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it moves parameters between the closure's forwards, and that is no step
            optimizer.step(closure)
        for name, p in model.named_parameters():
            if name not in live:
                assert identical(before[name], p)
                frozen += 1
        assert any(not identical(before[name], p) for name, p in model.named_parameters() if name in live)
    assert frozen > 0
    assert handle.step_count == 8


def test_sparse_adam_trains_an_embedding():
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)
            self.block = LoopMLP(2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.block(self.table(tokens))

    model = Lookup()
    handle = rdp.attach(model, rate=0.5)
    optimizer = handle.wrap(torch.optim.SparseAdam(model.table.parameters(), lr=0.1))
    before = model.table.weight.detach().clone()
    model(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    moved = (model.table.weight != before).any(1)
    assert moved.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=20),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
])  # fmt: skip
def test_schedulers_drive_the_inner_optimizer(make):
    model, handle, inner, optimizer = setup(torch.optim.SGD, momentum=0.9)
    plain = torch.optim.SGD(CASE.model().parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        scheduler, expected = make(optimizer), make(plain)
        for step in range(3):
            train(model, optimizer, 1, step)
            plain.step()
            scheduler.step()
            expected.step()
            assert inner.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert inner.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]
    assert handle.step_count == 3


def test_clipping_sees_the_norm_of_the_live_gradients():
    model, handle, inner, optimizer = setup(torch.optim.SGD)
    spy = Spy(inner, model)
    for step in range(6):
        optimizer.zero_grad()
        loss(model(model.rows(4, step))).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        live = CASE.live(handle.masks, handle.phase)
        optimizer.step()
        assert {name for name, gradient in spy.gradients.items() if gradient is not None} == live
        clipped = torch.stack([g.square().sum() for g in spy.gradients.values() if g is not None]).sum().sqrt()
        assert norm > 1e-3
        torch.testing.assert_close(clipped.item(), 1e-3, rtol=1e-2, atol=0)


def test_step_hooks_and_zero_grad_reach_the_inner_optimizer():
    model, _, _, optimizer = setup()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    assert calls == ["before", "after"]
    optimizer.zero_grad(set_to_none=False)
    assert model.head.weight.grad is not None
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hidden_gradients_do_not_leak_into_the_next_step():
    """A gradient hidden in DROP and left in place is not learned from in FREEZE."""
    ends = []
    for set_to_none in (True, False):
        model, _, inner, optimizer = setup(torch.optim.SGD, momentum=0.9)
        for step in range(8):
            loss(model(model.rows(4, step))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        ends.append([p.detach() for p in model.parameters()])
        assert inner.state
    assert identical(*ends)


def test_several_optimizers_may_share_one_handle_if_one_of_them_is_the_last():
    """Stem and rest, say: both are masked, and the phase advances once a step."""
    model = CASE.model()
    handle = CASE.attach(model)
    body = torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = handle.wrap(body)
    head = torch.optim.SGD([*model.stem.parameters(), *model.head.parameters()], lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        head.zero_grad()
        loss(model(model.rows(4, step))).backward()
        head.step()
        optimizer.step()
        assert handle.step_count == step + 1


def test_parameters_of_other_models_are_left_to_the_inner_optimizer():
    model = CASE.model()
    other = nn.Linear(2, 1).double()
    handle = CASE.attach(model)
    inner = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    optimizer = handle.wrap(inner)
    before = copy.deepcopy(other.weight.detach())
    other(model(model.rows(4, 0))).sum().backward()
    optimizer.step()
    assert not torch.equal(before, other.weight)


def test_a_parameter_that_the_user_froze_stays_frozen():
    model, _, inner, optimizer = setup(weight_decay=0.1)
    model.stem.weight.requires_grad_(False)
    before = snapshot(model, inner)["stem.weight"]
    train(model, optimizer, 4)
    assert identical(before, snapshot(model, inner)["stem.weight"])


def test_after_remove_it_is_the_inner_optimizer():
    model, handle, inner, optimizer = setup(torch.optim.SGD, momentum=0.9)
    train(model, optimizer, 3)
    twin = CASE.model()
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle.remove()
    train(model, optimizer, 3, 3)
    train(twin, plain, 3, 3)
    assert identical(snapshot(model, inner), snapshot(twin, plain))
