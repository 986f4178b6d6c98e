"""`handle.check()`: sound training has no problem, and each thing that goes wrong is reported, word by word."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from laws.architectures import LoopMLP
from laws.strategies import Case
from torch import nn

import rdp

CASE = Case(LoopMLP, (3,), rate=0.5, mode="batch", decay="constant", seed=2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def attached(case: Case = CASE, **changes: Any) -> tuple[nn.Module, rdp.ResidualDropPath, torch.optim.Optimizer]:
    """A model whose branches are known, with a wrapped optimizer."""
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0), **changes)
    return model, handle, handle.wrap(sgd(model.parameters()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, rows: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(model.rows(rows, step)).square().sum().backward()
        optimizer.step()


def problem(handle: rdp.ResidualDropPath) -> str:
    """The only one."""
    checkup = handle.check()
    assert not checkup.ok
    (only,) = checkup.problems
    assert str(checkup) == "\n".join(["1 problem", *checkup.facts, f"PROBLEM: {only}"])
    return only


# -- what is sound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.filterwarnings("error::rdp.RdpWarning")
def test_sound_training_has_no_problem(mode, several):
    model = CASE.model()
    handle = CASE.attach(model, mode=mode, verify=True)
    halves = [model.layers.parameters(), [*model.stem.parameters(), *model.head.parameters()]]
    optimizers = [handle.wrap(sgd(p)) for p in (halves if several else [model.parameters()])]
    for step in range(7):
        model(model.rows(3, step)).square().sum().backward()
        frozen = len(handle.frozen)
        for optimizer in optimizers if step < 6 else []:
            optimizer.step()
            optimizer.zero_grad()  # before the others have stepped
        model.eval()
        model(model.rows(2, step))
        model.train()
    checkup = handle.check()
    assert checkup.ok
    assert checkup.problems == ()
    lines = str(checkup).splitlines()
    assert lines[:5] == [
        "sound",
        "LoopMLP: 3 gated branches of 3",
        "7 training forwards, 6 steps; the phase is DROP",
        f"{len(optimizers)} wrapped optimizers, {frozen} parameters frozen in this step",
        "proved on two rows of the input",
    ]
    assert len(lines) == 5 + len(handle.branches)


def test_the_first_facts_name_what_is_not_gated():
    class Net(LoopMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return x + (f := self.again(x)) * f.sigmoid().mean()

    model = Net(3)
    model.again = nn.Linear(2, 2)
    with pytest.warns(rdp.RdpWarning, match="1 residual sums are left ungated"):
        handle = rdp.attach(model, 0.5, example_inputs=model.rows(2, 0))
    assert handle.check().facts[0] == (
        "Net: 2 gated branches of 3 (the others have rate 0 and are trained plainly in all phases), 1 sums not gated"
    )


def test_lbfgs_and_several_micro_batches_are_sound():
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = handle.wrap(torch.optim.LBFGS(model.parameters(), max_iter=3))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(model(model.rows(2, k)).square().sum() for k in range(2))
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert handle.check().problems == ()


@pytest.mark.filterwarnings("error::rdp.RdpWarning")
def test_one_unannounced_move_is_the_climb_of_sam():
    model, handle, optimizer = attached()
    for step in range(4):
        for climb in (True, False):
            optimizer.zero_grad()
            model(model.rows(3, step)).square().sum().backward()
            (optimizer.optimizer if climb else optimizer).step()
    assert not any("announced" in problem for problem in handle.check().problems)


# -- what is not ------------------------------------------------------------------------------------------------------


def test_before_the_first_forward_and_after_removal():
    handle = CASE.attach(CASE.model())
    assert problem(handle) == "no branch is known yet: run a training forward, or call handle.discover(inputs)"
    handle.remove()
    assert problem(handle) == "the handle was removed, so the model trains plainly; attach again"


def test_hooks_that_are_lost():
    model, handle, _ = attached()
    other_model, other, _ = attached()
    model.layers[0] = nn.Linear(4, 4)  # which is gated instead
    model.layers[2] = other_model.layers[2]  # which has the hooks of another handle
    with pytest.warns(rdp.RdpWarning, match="`layers.2` ended a branch and is not in the model any more, or has the"):
        assert handle.check().problems[0] == (
            "`layers.2` lost the hook, or was replaced by another module, and trains plainly; attach again"
        )
    del model.layers[1]
    with pytest.warns(rdp.RdpWarning, match="`layers.1`, `layers.2` ended a branch"):
        assert handle.check().problems[0].startswith("`layers.1`, `layers.2` lost the hook")
    assert other.check().ok


def test_a_branch_of_rate_0_has_no_hook_to_lose():
    model, handle, _ = attached(decay="linear")
    model(model.rows(2, 0))
    model.layers[0] = model.layers[0][:]
    assert handle.check().ok


@pytest.mark.parametrize(
    ("count", "listed"),
    [
        (6, "`layers.1`, `layers.2`, `layers.3`, `layers.4`, `layers.5`"),
        (8, "`layers.1`, `layers.2`, `layers.3`, `layers.4`, `layers.5` and 2 more"),
    ],
)
def test_branches_that_no_forward_has_reached(count, listed):
    """Once there was one; only so many are named."""
    model, handle, _ = attached(Case(LoopMLP, (count,), rate=0.5, decay="constant"))
    assert handle.check().ok
    layers, model.layers = model.layers, model.layers[:1]
    model(model.rows(2, 0))
    model.layers = layers
    assert problem(handle) == (f"{listed} was never reached by a training forward: the model does not call it any more")
    model(model.rows(2, 0))
    assert handle.check().ok


@pytest.mark.parametrize("where", ["in a branch", "a branch"])
def test_parameters_that_came_later(where):
    model, handle, optimizer = attached()
    train(model, optimizer, 2)
    if where == "in a branch":
        model.layers[1].register_parameter("late", nn.Parameter(torch.zeros(4)))
    else:
        model.layers.append(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()).double())
    name = "layers.1.late" if where == "in a branch" else "layers.3.0.weight"
    model(model.rows(2, 0))
    assert problem(handle) == (
        f"`{name}` was added after the branches were found, so it is not frozen with the branch that it is in, nor "
        "gated if it makes a branch of its own; attach again, after the model is complete"
    )


def test_optimizers_that_are_not_wrapped():
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    assert problem(handle) == (
        "no optimizer is wrapped: frozen parameters drift with momentum and weight decay, and phases alternate only "
        "where handle.advance() is called. Use optimizer = handle.wrap(optimizer)"
    )
    shared = model.layers[0][0].weight
    model.layers[1][0].weight = shared
    handle.remove()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    loose = {id(shared): "layers.0.0.weight", id(model.layers[1][0].bias): "layers.1.0.bias"}
    some = [p for p in model.parameters() if id(p) not in loose]
    handle.wrap(torch.optim.SGD([{"params": some[:1]}, {"params": some[1:]}], lr=0.1))
    names = "`layers.0.0.weight`, `layers.1.0.bias`"  # the shared one, once
    rest = "is in no wrapped optimizer: another one that moves it does not keep it frozen"
    assert problem(handle) == f"{names} {rest}"
    shared.requires_grad_(False)  # which nobody moves
    assert problem(handle) == f"`layers.1.0.bias` {rest}"


def test_steps_that_were_not_announced():
    model, handle, optimizer = attached()
    with pytest.warns(rdp.RdpWarning, match="no step was announced"):
        train(model, optimizer.optimizer, 3)
    assert problem(handle) == (
        "parameters changed without an announced step, so DROP and FREEZE did not alternate; see handle.wrap"
    )


@torch.no_grad()
def decay(model: nn.Module) -> None:
    for parameter in model.layers.parameters():
        parameter.mul_(0.9)


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_frozen_parameters_that_something_else_moved(when):
    model, handle, optimizer = attached()
    first = None
    for step in range(4):
        model(model.rows(3, step)).square().sum().backward()
        frozen = handle.frozen
        if when == "before the step":
            decay(model)
        optimizer.step()
        if when == "after the step":
            decay(model)
        optimizer.zero_grad()
        if frozen:
            first = (step, frozen)
            break
    model(model.rows(3, 9))
    assert first is not None
    names = ", ".join(f"`{name}`" for name in first[1])
    assert problem(handle) == (
        f"{names} moved although frozen in that step (first seen in step {first[0]}): another optimizer, or code that "
        "writes to parameters"
    )


@pytest.mark.parametrize(("rate", "rows", "never"), [(0.2, 2, True), (0.25, 2, False), (0.2, 3, False), (0.1, 4, True)])
def test_rates_that_round_to_no_row(rate, rows, never):
    for sampling in ("fixed", "bernoulli"):
        model, handle, _ = attached(rate=rate, mode="row", sampling=sampling)
        assert handle.check().ok, "rows are not known yet"
        model(model.rows(rows, 0))
        if never and sampling == "fixed":
            assert problem(handle) == (
                f"`layers.0`, `layers.1`, `layers.2` is never dropped: its rate rounds to 0 of {rows} rows; see "
                "sampling='bernoulli'"
            )
        else:
            assert handle.check().ok


def test_branches_that_ran_outside_of_a_forward():
    model, handle, optimizer = attached()
    train(model, optimizer)
    with pytest.warns(rdp.RdpWarning, match="ran outside of a forward"):
        model.layers[1](model.stem(model.rows(2, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)  # once is enough
        model.layers[1](model.stem(model.rows(2, 0)))
    assert problem(handle) == (
        "branches ran outside of a forward of the attached model; attach to the module that is called"
    )
