"""`handle.check()`: sound training has no problem, and each thing that goes wrong is reported with its names."""

import warnings

import pytest
import torch
from laws.architectures import LoopMLP
from laws.strategies import Case
from torch import nn

import rdp

CASE = Case(LoopMLP, (3,), rate=0.5, mode="batch", decay="constant", seed=2)


def train(model, optimizer, steps=4, rows=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(model.rows(rows, step)).square().sum().backward()
        optimizer.step()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def the_problem(handle, *words):
    """The only problem, which names all of `words`."""
    checkup = handle.check()
    assert not checkup.ok
    (problem,) = checkup.problems
    for word in words:
        assert word in problem
    assert f"PROBLEM: {problem}" in str(checkup)
    return problem


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.filterwarnings("error::rdp.RdpWarning")
def test_sound_training_has_no_problem(mode, several):
    model = CASE.model()
    handle = CASE.attach(model, mode=mode)
    halves = [model.layers.parameters(), [*model.stem.parameters(), *model.head.parameters()]]
    optimizers = [handle.wrap(sgd(p)) for p in (halves if several else [model.parameters()])]
    for step in range(6):
        model(model.rows(3, step)).square().sum().backward()
        frozen = {name: model.get_parameter(name).detach().clone() for name in handle.frozen}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()  # before the others have stepped
        for name, old in frozen.items():
            assert torch.equal(model.get_parameter(name), old)
        model.eval()
        model(model.rows(2, step))
        model.train()
    checkup = handle.check()
    assert checkup.ok
    assert "3 gated branches of 3" in str(checkup)
    assert "6 training forwards, 6 steps" in str(checkup)
    assert f"{len(optimizers)} wrapped" in str(checkup)


def test_lbfgs_and_several_micro_batches_are_sound():
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = handle.wrap(torch.optim.LBFGS(model.parameters(), max_iter=3))

    def closure():
        optimizer.zero_grad()
        loss = sum(model(model.rows(2, k)).square().sum() for k in range(2))
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert handle.check().problems == ()


def test_before_the_first_forward_and_after_removal():
    model = CASE.model()
    handle = CASE.attach(model)
    the_problem(handle, "no branch is known", "discover")
    handle.remove()
    the_problem(handle, "removed")


def test_a_branch_that_was_replaced_lost_its_hook():
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = handle.wrap(sgd(model.parameters()))
    train(model, optimizer, 2)
    model.layers[1] = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    problems = handle.check().problems
    assert any("`layers.1` lost the hook" in problem for problem in problems)


@pytest.mark.parametrize("where", ["in a branch", "a branch"])
def test_what_was_added_after_the_branches_were_found_is_named(where):
    model = CASE.model()
    handle = CASE.attach(model)
    train(model, handle.wrap(sgd(model.parameters())), 2)
    if where == "in a branch":
        nn.utils.parametrizations.weight_norm(model.layers[1][0])
    else:
        model.layers.append(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())
    name = "layers.1.0.parametrizations.weight.original0" if where == "in a branch" else "layers.3.0.weight"
    model(model.rows(2, 0))
    the_problem(handle, f"`{name}`", "added after", "attach again")


def test_a_branch_that_no_forward_reaches_is_named():
    case = Case(LoopMLP, (3,), rate=0.5, decay="constant")
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    optimizer = handle.wrap(sgd(model.parameters()))
    train(model, optimizer, 1)
    assert handle.check().ok
    last, model.layers = model.layers[2], model.layers[:2]
    handle._run.watch.reached.clear()
    train(model, optimizer, 2)
    assert "`layers.2`" in " ".join(handle.check().problems)
    model.layers.append(last)


def test_without_a_wrapped_optimizer():
    model = CASE.model()
    handle = CASE.attach(model)
    model(model.rows(2, 0))
    handle.advance()
    the_problem(handle, "no optimizer is wrapped", "handle.wrap")


def test_a_parameter_in_no_wrapped_optimizer_is_named():
    model = CASE.model()
    handle = CASE.attach(model)
    some = [p for name, p in model.named_parameters() if name != "layers.1.0.weight"]
    train(model, handle.wrap(sgd(some)))
    the_problem(handle, "`layers.1.0.weight`", "no wrapped optimizer")


def test_steps_that_were_not_announced():
    model = CASE.model()
    handle = CASE.attach(model)
    inner = sgd(model.parameters())
    handle.wrap(inner)
    with pytest.warns(rdp.RdpWarning, match="no step was announced"):
        train(model, inner, 3)
    the_problem(handle, "without an announced step", "wrap")


@torch.no_grad()
def decay(model):
    for parameter in model.layers.parameters():
        parameter.mul_(0.9)


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_frozen_parameters_that_something_else_moved_are_named(when):
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = handle.wrap(sgd(model.parameters()))
    moved = set()
    for step in range(4):
        model(model.rows(3, step)).square().sum().backward()
        moved |= set(handle.frozen)
        if when == "before the step":
            decay(model)
        optimizer.step()
        if when == "after the step":
            decay(model)
        optimizer.zero_grad()
    model(model.rows(3, 9))
    assert moved
    assert set(handle._run.watch.moved) == moved
    problem = the_problem(handle, "moved although frozen", "another optimizer")
    assert any(f"`{name}`" in problem for name in moved)


def test_one_unannounced_move_is_the_climb_of_sam_and_no_warning():
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = handle.wrap(sgd(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        for step in range(4):
            for _ in range(2):
                optimizer.zero_grad()
                model(model.rows(3, step)).square().sum().backward()
                if not _:
                    optimizer.optimizer.step()  # the climb
            optimizer.step()
    assert not any("announced" in problem for problem in handle.check().problems)


def test_a_rate_that_rounds_to_no_row_is_named():
    model = CASE.model()
    handle = CASE.attach(model, rate=0.2, mode="row", decay="linear", sampling="fixed")
    train(model, handle.wrap(sgd(model.parameters())), rows=3)
    the_problem(handle, "`layers.1`", "of 3 rows")


def test_branches_that_ran_outside_of_a_forward_are_reported():
    model = CASE.model()
    handle = CASE.attach(model)
    train(model, handle.wrap(sgd(model.parameters())))
    with pytest.warns(rdp.RdpWarning, match="ran outside of a forward"):
        model.layers[1](model.stem(model.rows(2, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)  # once is enough
        model.layers[1](model.stem(model.rows(2, 0)))
    the_problem(handle, "outside of a forward", "attach to the module that is called")
