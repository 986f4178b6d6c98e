"""When a step is over, and which of its forwards a closure, a pause or another optimizer leaves to count."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from laws.masks import draw
from laws.strategies import Case
from laws.training import loss
from torch import Tensor, nn
from torch.optim import SGD, Adam

import rdp
from rdp import Phase

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def attached(**changes: Any) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    return model, CASE.attach(model, **{"example_inputs": model.rows(2, 0)} | changes)


def learn(model: nn.Module, rows: int = 4, seed: int = 0) -> Tensor:
    value = loss(model(model.rows(rows, seed)))
    value.backward()
    return value


def drawn(number: int, rows: int = 4, cycle: int = 0) -> list[list[bool]]:
    """The masks of forward `number` of a DROP step."""
    return draw([0.6] * 3, rows, seed=2, cycle=cycle, micro_batch=number)


def counted(handle: rdp.ResidualDropPath) -> list[list[int]]:
    """The position and the rows of the forwards that have learnt in this step."""
    return handle.state_dict()["forwards"]


@pytest.fixture(autouse=True)
def _nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        yield


# -- several optimizers -----------------------------------------------------------------------------------------------


def test_one_of_several_optimizers_that_steps_twice_ends_the_step_too():
    model, handle = attached()
    first, _ = (handle.wrap(SGD(part.parameters(), lr=0.1)) for part in (model.body, model.head))
    learn(model)
    first.step()
    assert handle.step_count == 0
    learn(model, seed=1)
    first.step()
    assert handle.step_count == 1


def test_an_optimizer_that_takes_the_place_of_another_ends_the_step_alone():
    model, handle = attached()
    handle.wrap(SGD(model.parameters(), lr=0.1))
    new = handle.wrap(Adam(model.parameters(), lr=0.1))
    learn(model)
    new.step()
    assert handle.step_count == 1
    assert handle.check().facts[2].startswith("1 wrapped optimizers")


def test_forwards_between_the_steps_of_several_optimizers_belong_to_one_step():
    """As where each has a loss of its own; the gradients of the first may be cleared after its step."""
    model, handle = attached()
    parts = (model.stem, model.body, model.head)
    optimizers = [handle.wrap(SGD(part.parameters(), lr=0.1)) for part in parts]
    for step in range(4):
        for number, optimizer in enumerate(optimizers):
            assert (handle.step_count, handle.phase) == (step, (Phase.DROP, Phase.FREEZE)[step % 2])
            learn(model)
            assert handle.masks.tolist() == drawn(number, cycle=step // 2)
            optimizer.step()
            model.zero_grad()
    assert handle.step_count == 4


# -- closures ---------------------------------------------------------------------------------------------------------


class Searching(SGD):
    """Calls its closure three times and steps on the gradients of the last."""

    def step(self, closure: Any = None) -> list[float]:
        values = [closure().item() for _ in range(3)]
        super().step()
        return values


@pytest.mark.parametrize("clears", [True, False])
def test_every_call_of_a_closure_has_the_same_masks_and_only_the_last_counts(clears):
    model, handle = attached()
    optimizer = handle.wrap(Searching(model.parameters(), lr=0.1))
    masks: list[list[list[bool]]] = []

    def closure() -> Tensor:
        if clears:
            optimizer.zero_grad()
        value = learn(model)
        masks.append(handle.masks.tolist())
        assert counted(handle) == [[0, 4]]
        return value

    values = optimizer.step(closure)
    assert masks == [drawn(0)] * 3
    assert len(set(values)) == 1
    assert handle.state_dict()["replayed"] == [[0, 4]]
    optimizer.step(closure)
    assert masks[3:] == [drawn(0)] * 3


def test_forwards_before_a_closure_count_with_its_last_call():
    """Gradient accumulation, of which the closure adds the last part."""
    model, handle = attached()
    optimizer = handle.wrap(Searching(model.parameters(), lr=0.1))
    learn(model, rows=3)
    masks: list[list[list[bool]]] = []

    def closure() -> Tensor:
        value = learn(model)
        masks.append(handle.masks.tolist())
        assert counted(handle) == [[0, 3], [1, 4]]
        return value

    optimizer.step(closure)
    assert masks == [drawn(1)] * 3
    assert handle.state_dict()["replayed"] == [[0, 3], [1, 4]]


def test_what_a_closure_has_frozen_is_what_its_last_call_has_shown():
    model, handle = attached(mode="batch")
    optimizer = handle.wrap(Searching(model.parameters(), lr=0.1, weight_decay=0.1))
    frozen = 0
    for step in range(8):
        still: set[str] = set()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}

        def closure(step: int = step, still: set[str] = still) -> Tensor:
            optimizer.zero_grad()
            value = learn(model, seed=step)
            still.update(handle.frozen)
            return value

        optimizer.step(closure)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert not moved & still
        frozen += len(still)
    assert frozen


# -- other forwards ---------------------------------------------------------------------------------------------------


def test_pauses_may_be_nested_and_forwards_in_them_are_none_of_the_step():
    model, handle = attached()
    x = model.rows(4, 0)
    with handle.paused():
        with handle.paused():
            pass
        assert torch.equal(model(x), CASE.model()(x))
        learn(model)
    assert counted(handle) == []
    assert handle.check().facts[1].startswith("0 training forwards")
    model.zero_grad()
    learn(model)
    assert handle.masks.tolist() == drawn(0)


def test_a_forward_that_is_only_run_has_the_masks_of_the_next():
    """Twice the same model, twice the same masks; what is learnt from keeps them, and the next has others."""
    model, handle = attached()
    for _ in range(2):
        model(model.rows(4, 0))
        assert handle.masks.tolist() == drawn(0)
    learn(model)
    assert handle.masks.tolist() == drawn(0)
    model(model.rows(4, 0))
    assert handle.masks.tolist() == drawn(1)


def test_who_clears_gradients_before_the_step_is_announced_has_not_thrown_them_away():
    """`step(); zero_grad(); advance()` is one order of three."""
    model, handle = attached()
    for _ in range(2):
        learn(model)
    model.zero_grad()
    handle.advance()
    assert handle.state_dict()["replayed"] == [[0, 4], [1, 4]]


@pytest.mark.parametrize("freeze", ["params", "output"])
def test_where_parameters_are_frozen_all_micro_batches_of_a_step_have_one_mask(freeze):
    model, handle = attached(mode="batch", freeze=freeze)
    seen = set()
    for seed in range(8):
        learn(model, 2, seed)
        seen.add(tuple(handle.masks[:, 0].tolist()))
    assert (len(seen) == 1) == (freeze == "params")


def test_parameters_that_a_state_moves_are_no_steps():
    model, handle = attached()
    handle.wrap(SGD(model.parameters(), lr=0.1))
    for step in range(4):
        learn(model, seed=step)
        with torch.no_grad():
            model.head.weight.add_(1)
        handle.load_state_dict(handle.state_dict())
    assert handle.check().problems == ()
