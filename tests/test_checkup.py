"""`rdp.watch` and `rdp.doctor` by themselves: what is noticed between forwards, and each problem word by word."""

from __future__ import annotations

import linecache
import warnings

import pytest
import torch
from laws.architectures import LoopMLP
from laws.strategies import Case
from torch import nn

import rdp
from rdp import Phase
from rdp.branches import Branch
from rdp.doctor import Checkup
from rdp.slots import slots
from rdp.watch import Watch

CASE = Case(LoopMLP, (3,), rate=0.5, mode="batch", decay="constant", seed=2)


def attached(**changes) -> tuple[nn.Module, rdp.ResidualDropPath]:
    """A model whose branches are known, with a wrapped optimizer."""
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0), **changes)
    handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    return model, handle


# -- Watch ------------------------------------------------------------------------------------------------------------


class Parameters(nn.Module):
    """Parameters b0 and b1 of a branch, and others around it."""

    def __init__(self, outside: int) -> None:
        super().__init__()
        for name in ["b0", "b1", *(f"p{i}" for i in range(outside))]:
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))


def watching(outside: int = 2) -> tuple[Parameters, Watch]:
    model = Parameters(outside)
    watch = Watch(model)
    watch.found([Branch("b", "", "identity", ("b0", "b1"))], slots(model))
    return model, watch


@torch.no_grad()
def move(*parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.add_(1)


def forward(watch: Watch, step: int = 0, in_step: bool = False) -> list[str]:
    """A forward begins; the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch.forward_begins(Phase.FREEZE, step, in_step)
    assert all(warning.category is rdp.RdpWarning for warning in caught)
    return [str(warning.message) for warning in caught]


UNANNOUNCED = (
    "parameters have changed since the last training forward, but the phase is still FREEZE: no step was announced, so "
    "DROP and FREEZE do not alternate. Step the optimizer that handle.wrap(...) returned, or call handle.advance() "
    "after each step"
)


@pytest.mark.parametrize("name", ["b0", "b1", "p0", "p1"])
def test_the_second_step_in_a_row_that_was_not_announced_is_told_once(name):
    model, watch = watching()
    told = []
    for _ in range(4):
        told.append(forward(watch))
        move(model.get_parameter(name))
    assert told == [[], [], [UNANNOUNCED], []]
    assert watch.forwards == 4
    assert watch.warned == {"unannounced"}


def test_what_may_happen_between_forwards():
    model, watch = watching()
    for number in range(12):
        assert forward(watch, in_step=number % 4 == 2) == []
        assert forward(watch) == []  # nothing moved
        if number % 4 == 0:
            watch.step_ends(frozenset())
            move(*model.parameters())
        elif number % 4 == 1:
            move(*model.parameters())
        elif number % 4 == 3:
            move(*model.parameters())
            watch.forget()
    assert watch.moved == {}
    assert watch.forwards == 24


def test_until_all_optimizers_have_stepped_parameters_may_move():
    model, watch = watching()
    for _ in range(4):
        assert forward(watch, in_step=True) == []
        move(model.b0)


def test_frozen_parameters_that_move_are_noted_with_the_step():
    model, watch = watching()
    forward(watch, 0)
    watch.step_ends(frozenset({id(model.b0), id(model.p0)}))
    move(model.b0, model.b1, model.p1)
    forward(watch, 3)
    assert watch.moved == {"b0": 2}
    watch.step_ends(frozenset({id(model.b1)}))
    move(model.b0, model.b1)
    forward(watch, 4)
    assert watch.moved == {"b0": 2, "b1": 3}
    move(model.b0, model.b1)  # not announced, so nobody said that they are frozen
    forward(watch, 5)
    assert watch.moved == {"b0": 2, "b1": 3}


def test_a_step_that_is_announced_begins_the_count_anew():
    model, watch = watching()
    for _ in range(6):
        assert forward(watch) == []
        move(model.b0)
        assert forward(watch) == []
        watch.step_ends(frozenset())


def test_before_branches_are_known_nothing_is_watched():
    watch = Watch(Parameters(2))
    assert watch.has_no_gradients()
    assert [forward(watch) for _ in range(3)] == [[], [], []]
    assert watch.moved == {}
    assert not watch.compiled


def test_gradients_are_told_from_a_few_parameters_that_always_learn():
    model, watch = watching(outside=11)
    probed = [f"p{i}" for i in (0, 1, 2, 3, 7, 8, 9, 10)]
    assert watch.has_no_gradients()
    for name, parameter in model.named_parameters():
        before = watch.gradients()
        parameter.grad = torch.zeros(1)
        assert (watch.gradients() != before) == (name in probed)
        assert watch.has_no_gradients() == (name not in probed)
        made = watch.gradients()
        parameter.grad += 1
        assert (watch.gradients() != made) == (name in probed)
        made, kept = watch.gradients(), parameter.grad
        parameter.grad = torch.zeros(1).add_(1)  # another one, as often written to
        assert kept._version == parameter.grad._version
        assert (watch.gradients() != made) == (name in probed)
        parameter.grad = None
        assert watch.gradients() == before


def test_parameters_that_do_not_learn_are_not_watched_and_branches_are_where_there_is_nothing_else():
    model, watch = watching()
    model.p0.requires_grad_(False)
    watch.found([Branch("b", "", "identity", ("b0", "b1"))], slots(model))
    forward(watch)
    watch.step_ends(frozenset({id(model.p0), id(model.p1)}))
    move(model.p0, model.p1)
    forward(watch, 1)
    assert watch.moved == {"p1": 0}
    model, watch = watching(outside=0)
    model.b0.grad = torch.zeros(1)
    assert not watch.has_no_gradients()


def test_each_thing_is_told_once():
    watch = Watch(Parameters(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key, text in (("a", "one"), ("a", "two"), ("b", "three")):
            watch.warn(key, text)
    assert [(str(w.message), w.category) for w in caught] == [("one", rdp.RdpWarning), ("three", rdp.RdpWarning)]


def test_a_warning_shows_the_line_that_called():
    """Past lines of this library and of torch."""
    model, _ = attached()
    with pytest.warns(rdp.RdpWarning) as caught:
        Watch(Parameters(0)).warn("a", "one")
    assert "Watch(Parameters(0))" in linecache.getline(caught[0].filename, caught[0].lineno)
    x = model.rows(2, 0)
    for _ in range(2):
        model(x)
        move(*model.parameters())
    with pytest.warns(rdp.RdpWarning) as caught:
        print(model(x))
    assert "print(model(x))" in linecache.getline(caught[0].filename, caught[0].lineno)


# -- the checkup ------------------------------------------------------------------------------------------------------


def test_a_checkup_is_printed_a_line_each():
    assert Checkup(("one", "two"), ()).ok
    assert str(Checkup(("one", "two"), ())) == "one\ntwo"
    assert not Checkup(("one",), ("bad", "worse")).ok
    assert str(Checkup(("one",), ("bad", "worse"))) == "one\nPROBLEM: bad\nPROBLEM: worse"


def test_the_facts():
    model, handle = attached()
    assert handle.check().facts == (
        "LoopMLP: 3 gated branches of 3",
        "0 training forwards, 0 steps; the phase is DROP",
        "1 wrapped optimizers, 0 parameters frozen in this step",
    )
    model(model.rows(2, 0))
    handle.advance()
    model(model.rows(2, 0))
    handle.refused = ("a", "b")
    checkup = handle.check()
    assert checkup.facts == (
        "LoopMLP: 3 gated branches of 3, 2 sums not gated",
        "2 training forwards, 1 steps; the phase is FREEZE",
        f"1 wrapped optimizers, {len(handle.frozen)} parameters frozen in this step",
    )
    assert checkup.problems == ()
    model, handle = attached(decay="linear")
    assert handle.check().facts[0] == "LoopMLP: 2 gated branches of 3"


def test_there_is_nothing_to_say_of_what_was_not_begun():
    model = CASE.model()
    handle = CASE.attach(model)
    assert handle.check().problems == (
        "no branch is known yet: run a training forward, or call handle.discover(inputs)",
    )
    handle.remove()
    assert handle.check().problems == ("the handle was removed, so the model trains plainly; attach again",)


def test_hooks_that_are_lost():
    model, handle = attached()
    others = CASE.model()
    other = CASE.attach(others, example_inputs=others.rows(2, 0))
    model.layers[0] = nn.Linear(4, 4)
    model.layers[2] = others.layers[2]  # which has the hooks of another handle
    assert handle.check().problems[0] == (
        "`layers.0`, `layers.2` lost the hook, or was replaced by another module, and trains plainly; attach again"
    )
    del model.layers[1]
    assert "`layers.1`" in handle.check().problems[0]
    assert other.check().facts[0] == "LoopMLP: 3 gated branches of 3"


def test_a_branch_of_rate_0_has_no_hook_to_lose():
    model, handle = attached(decay="linear")
    model(model.rows(2, 0))
    model.layers[0] = model.layers[0][:]
    assert not any("layers.0`" in problem for problem in handle.check().problems)


def test_branches_that_are_never_reached():
    model, handle = attached()
    assert handle.check().ok, "there was no forward yet"
    model(model.rows(2, 0))
    handle._run.watch.reached.remove(1)
    assert handle.check().problems == (
        "`layers.1` was never reached by a training forward: the model does not call it any more",
    )
    handle._run.watch.compiled = True
    assert handle.check().ok, "what compiled code reaches cannot be seen"


@pytest.mark.parametrize(
    ("count", "listed"),
    [
        (5, "`layers.0`, `layers.1`, `layers.2`, `layers.3`, `layers.4`"),
        (7, "`layers.0`, `layers.1`, `layers.2`, `layers.3`, `layers.4` and 2 more"),
    ],
)
def test_many_names_are_cut_short(count, listed):
    case = Case(LoopMLP, (count,), rate=0.5, decay="constant")
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    model(model.rows(2, 0))
    handle._run.watch.reached.clear()
    (problem,) = handle.check().problems
    assert problem.startswith(f"{listed} was never reached")


def test_optimizers_that_are_not_wrapped():
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    assert handle.check().problems == (
        "no optimizer is wrapped: frozen parameters drift with momentum and weight decay, and phases alternate only "
        "where handle.advance() is called. Use optimizer = handle.wrap(optimizer)",
    )
    named = dict(model.named_parameters())
    loose = [name for name in named if name.startswith("layers.1")]
    some = [p for name, p in named.items() if name not in loose]
    handle.wrap(torch.optim.SGD([{"params": some[:1]}, {"params": some[1:]}], lr=0.1))
    listed = ", ".join(f"`{name}`" for name in loose)
    assert handle.check().problems == (
        f"{listed} is in no wrapped optimizer: another one that moves it does not keep it frozen",
    )
    model.get_parameter(loose[0]).requires_grad_(False)  # which nobody moves
    assert handle.check().problems[0].startswith(", ".join(f"`{name}`" for name in loose[1:]) + " is in no wrapped")
    del model.layers[1]
    assert not any("in no wrapped optimizer" in problem for problem in handle.check().problems)


def test_a_loose_parameter_of_several_branches_is_named_once():
    model = CASE.model()
    shared = model.layers[0][0].weight
    model.layers[1][0].weight = shared
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    handle.wrap(torch.optim.SGD([p for p in model.parameters() if p is not shared], lr=0.1))
    (problem,) = handle.check().problems
    assert problem.count("`") == 2
    assert "`layers.0.0.weight` is in no wrapped optimizer" in problem


def test_parameters_that_came_later():
    model, handle = attached()
    model.layers[1].register_parameter("late", nn.Parameter(torch.zeros(4)))
    assert handle.check().problems == (
        "`layers.1.late` was added after the branches were found, so it is not frozen with the branch that it is in, "
        "nor gated if it makes a branch of its own; attach again, after the model is complete",
    )


def test_what_was_warned_of_in_training():
    _, handle = attached()
    handle._run.watch.warned.update({"unannounced", "stray"})
    handle._run.watch.moved.update({"layers.0.0.weight": 7, "layers.1.0.weight": 4})
    assert handle.check().problems == (
        "parameters changed without an announced step, so DROP and FREEZE did not alternate; see handle.wrap",
        "branches ran outside of a forward of the attached model; attach to the module that is called",
        "`layers.0.0.weight`, `layers.1.0.weight` moved although frozen in that step (first seen in step 4): another "
        "optimizer, or code that writes to parameters",
    )


@pytest.mark.parametrize(("rate", "rows", "never"), [(0.2, 2, True), (0.25, 2, False), (0.2, 3, False), (0.1, 4, True)])
def test_rates_that_round_to_no_row(rate, rows, never):
    model, handle = attached(rate=rate, mode="row", sampling="fixed")
    assert handle.check().ok, "rows are not known yet"
    model(model.rows(rows, 0))
    problems = handle.check().problems
    assert problems == (
        (
            f"`layers.0`, `layers.1`, `layers.2` is never dropped: its rate rounds to 0 of {rows} rows; see "
            "sampling='bernoulli'",
        )
        if never
        else ()
    )
    model, handle = attached(rate=rate, mode="row")
    model(model.rows(rows, 0))
    assert handle.check().ok
