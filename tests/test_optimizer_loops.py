"""What loops do with optimizers: several of them, groups added later, batches thrown away, schedules, scaled losses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from laws.training import identical, loss, snapshot
from laws.twins import CASE, STEPS, Twins, objective
from torch.optim import Optimizer, lr_scheduler

import rdp

# -- several optimizers, groups added later, zero_grad ---------------------------------------------------------------


def test_the_step_ends_when_each_of_several_optimizers_has_stepped() -> None:
    """One for the branches and one for the rest, in either order, equal one for all."""
    twins = Twins(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1))
    other = CASE.model()
    handle = CASE.attach(other)
    body = handle.wrap(torch.optim.AdamW(other.body.parameters(), lr=0.01, weight_decay=0.1))
    rest = handle.wrap(
        torch.optim.AdamW([*other.stem.parameters(), *other.head.parameters()], lr=0.01, weight_decay=0.1)
    )
    for number in range(STEPS):
        twins.step(number)
        objective(other(other.rows(4, number))).backward()
        phase = handle.phase
        first, second = (body, rest) if number % 3 else (rest, body)
        first.step()
        assert (handle.phase, handle.step_count) == (phase, number), "the other optimizer has not stepped yet"
        second.step()
        assert handle.step_count == number + 1
        body.zero_grad()
        rest.zero_grad()
        assert identical(dict(other.state_dict()), dict(twins.model.state_dict()))
    twins.check_shown()


@pytest.mark.filterwarnings("error::rdp.RdpWarning")
def test_an_optimizer_that_is_wrapped_twice_steps_once_by_either_wrapper() -> None:
    model = CASE.model()
    handle = CASE.attach(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrappers = [handle.wrap(inner), handle.wrap(inner)]
    for number in range(4):
        objective(model(model.rows(4, number))).backward()
        wrappers[number % 2].step()
        assert handle.step_count == number + 1


def test_an_optimizer_that_another_has_replaced_warns_when_it_steps() -> None:
    """One over all parameters and one over the head: the phase would end when the second alone has stepped."""
    model = CASE.model()
    handle = CASE.attach(model)
    first = handle.wrap(torch.optim.AdamW(model.parameters(), lr=0.1))
    second = handle.wrap(torch.optim.SGD(model.head.parameters(), lr=0.1))
    objective(model(model.rows(4, 0))).backward()
    with pytest.warns(rdp.RdpWarning, match=r"this AdamW stepped, .* Give each parameter to one optimizer") as caught:
        first.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.step()


@pytest.mark.parametrize("later", ["head", "body.1"])
def test_a_group_added_later(later: str) -> None:
    """A head, or a whole residual block, that starts to train in the middle, as in gradual unfreezing."""
    twins = Twins(
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
        takes=lambda name, _: not name.startswith(later),
    )
    before = copy.deepcopy(twins.model.get_submodule(later).state_dict())
    for number in range(3):
        twins.step(number)
    assert identical(dict(twins.model.get_submodule(later).state_dict()), dict(before))
    for model, optimizer in ((twins.model, twins.optimizer), (twins.plain_model, twins.plain)):
        optimizer.add_param_group({"params": list(model.get_submodule(later).parameters()), "lr": 0.1})
    for number in range(3, 3 + STEPS):
        twins.step(number)
    assert not identical(dict(twins.model.get_submodule(later).state_dict()), dict(before))
    twins.check_shown()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_gradients_set_to_zero_instead_of_none(cls: type[Optimizer]) -> None:
    """A gradient of zero is not frozen; ours is hidden, so the run is the same."""
    ends = []
    for set_to_none in (True, False):
        twins = Twins(lambda ps: cls(ps, lr=0.01, weight_decay=0.1), set_to_none=set_to_none)
        twins.run()
        ends.append(snapshot(twins.model, twins.inner))
    assert identical(*ends)


@pytest.mark.parametrize("number", [0, 3])
def test_a_batch_that_is_thrown_away_leaves_no_trace(number: int) -> None:
    """Its loss was nan, say; `zero_grad` after its backward, and the step begins anew with the same masks."""
    ends = []
    for thrown in (False, True):
        twins = Twins(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1))
        for step in range(STEPS):
            if thrown and step == number:
                twins.optimizer.zero_grad()
                (objective(twins.model(twins.model.rows(7, 77))) * float("nan")).backward()
            twins.step(step)
        twins.check_shown()
        ends.append((snapshot(twins.model, twins.inner), twins.handle.masks))
    assert identical(*ends)


# -- learning rate schedules -----------------------------------------------------------------------------------------

SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """A schedule counts optimizer steps; DROP and FREEZE are one each."""
    twins = Twins(lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.1))
    rates = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        warnings.filterwarnings("ignore", "The epoch parameter")  # by SequentialLR of old versions
        ours, theirs = SCHEDULERS[name](twins.optimizer), SCHEDULERS[name](twins.plain)
        for number in range(STEPS):
            twins.step(number)
            for schedule in (ours, theirs):
                schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
            (group,), (expected,) = twins.inner.param_groups, twins.plain.param_groups
            assert (group["lr"], group["momentum"]) == (expected["lr"], expected["momentum"])
            rates.add(group["lr"])
    assert len(rates) > 3
    assert identical(ours.state_dict()["_last_lr"], theirs.state_dict()["_last_lr"])
    twins.check_shown()


# -- gradient scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", ["optimizer.zero_grad", "model.zero_grad", "set_to_none=False"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("cls", "chosen"), [(torch.optim.SGD, {}), (torch.optim.AdamW, {"fused": True})])
def test_a_skipped_step_waits_with_its_masks(
    cls: type[Optimizer], chosen: dict[str, Any], unscale: bool, clear: str
) -> None:
    """A step skipped for inf does not advance the phase; the next one has its masks, and equals a run without it."""
    ends = []
    for skips in (False, True):
        model = CASE.model()
        handle = CASE.attach(model)
        inner = cls(model.parameters(), lr=0.01, **chosen)
        optimizer = handle.wrap(inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=1.0 - 2**-53, growth_interval=1000)
        masks = []
        for number in range(STEPS):
            for attempt in range(2 if skips and number in (0, 3, 4) else 1):
                bad = attempt == 0 and skips and number in (0, 3, 4)
                x = model.rows(5, 50 + number) if bad else model.rows(4, number)
                phase, count = handle.phase, handle.step_count
                scaler.scale(loss(model(x)) * (float("inf") if bad else 1.0)).backward()
                if bad:
                    skipped = handle.masks
                elif attempt:
                    assert identical(handle.masks[:, :1], skipped[:, :1])
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                if clear == "model.zero_grad":
                    model.zero_grad()
                else:
                    optimizer.zero_grad(set_to_none=clear == "optimizer.zero_grad")
                assert handle.step_count == count + (not bad)
                assert (handle.phase is phase) == bad
            masks.append(handle.masks)
        assert handle.step_count == STEPS
        assert all(identical(drop, freeze) for drop, freeze in zip(masks[::2], masks[1::2], strict=True))
        ends.append((snapshot(model, inner), masks))
    assert identical(ends[0][1], ends[1][1])
    assert identical(ends[0][0], ends[1][0])
