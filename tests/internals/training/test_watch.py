"""What is noticed between two forwards: steps that nobody announced, and frozen parameters that moved."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rdp
from rdp import Phase
from rdp.branches import Branch
from rdp.training.frozen import Probes, slots
from rdp.training.watch import Watch


class Parameters(nn.Module):
    """Parameters b0 and b1 of a branch, and others around it."""

    def __init__(self, outside: int) -> None:
        super().__init__()
        for name in ["b0", "b1", *(f"p{i}" for i in range(outside))]:
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))


def found(watch: Watch, model: Parameters) -> None:
    probes = Probes()
    probes.choose(model, [Branch("b", "", "identity", ("b0", "b1"))], {})
    watch.found(slots(model), {*probes.names, "b0", "b1"})


def watching(outside: int = 2) -> tuple[Parameters, Watch]:
    model = Parameters(outside)
    watch = Watch(model)
    found(watch, model)
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


def test_a_step_that_is_announced_begins_the_count_anew():
    model, watch = watching()
    for _ in range(6):
        assert forward(watch) == []
        move(model.b0)
        assert forward(watch) == []
        watch.step_ends(frozenset())


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


def test_before_branches_are_known_nothing_is_watched():
    model = Parameters(2)
    watch = Watch(model)
    for _ in range(4):
        assert forward(watch) == []
        move(*model.parameters())
    assert watch.known == frozenset()
    found(watch, model)
    assert watch.known == {"b0", "b1", "p0", "p1"}


@pytest.mark.parametrize(("outside", "watched"), [(3, (0, 1, 2)), (11, (0, 1, 2, 3, 7, 8, 9, 10))])
def test_of_the_parameters_outside_of_branches_the_first_and_the_last_are_watched(outside, watched):
    model, watch = watching(outside)
    for number in range(outside):
        for _ in range(3):
            told = forward(watch)
            move(model.get_parameter(f"p{number}"))
        assert told == ([UNANNOUNCED] if number in watched else [])
        watch.warned.clear()
        watch.forget()
        forward(watch)
        watch.step_ends(frozenset())


def test_parameters_that_do_not_learn_are_not_watched_and_some_are_where_no_other_is_outside():
    model, watch = watching()
    model.p0.requires_grad_(False)
    found(watch, model)
    forward(watch)
    watch.step_ends(frozenset({id(model.p0), id(model.p1)}))
    move(model.p0, model.p1)
    forward(watch, 1)
    assert watch.moved == {"p1": 0}
    model.requires_grad_(False)
    found(watch, model)
    watch.forget()
    forward(watch, 1)
    watch.step_ends(frozenset({id(model.p0)}))
    move(model.p0)
    forward(watch, 2)
    assert watch.moved == {"p1": 0, "p0": 1}


def test_a_parameter_that_is_taken_away_has_changed_and_one_that_stays_away_has_not():
    model, watch = watching()
    told = []
    for _ in range(4):
        told += forward(watch)
        model.b0 = None
    assert told == []
    move(model.b1)
    assert forward(watch) == [UNANNOUNCED]


def test_each_thing_is_told_once():
    watch = Watch(Parameters(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key, text in (("a", "one"), ("a", "two"), ("b", "three")):
            watch.warn(key, text)
    assert [(str(w.message), w.category) for w in caught] == [("one", rdp.RdpWarning), ("three", rdp.RdpWarning)]
