"""`rdp.slots`: places of parameters, which outlive the parameters that are put into them."""

from __future__ import annotations

import torch
from torch import nn

from rdp.slots import Slot, present, slots


class Shared(nn.Module):
    """A module under two names, a parameter under two, one of the root's own, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        self.again = self.body[0]
        self.body[1].weight = self.again.weight
        self.own = nn.Parameter(torch.zeros(1))


def test_every_name_of_every_parameter_has_a_place():
    model = Shared()
    expected = dict(model.named_parameters(remove_duplicate=False))
    places = slots(model)
    assert set(expected) == {"own", "body.0.weight", "body.0.bias", "body.1.weight", "again.weight", "again.bias"}
    assert {name: slot.parameter for name, slot in places.items()} == expected
    assert all(slot.name == name for name, slot in places.items())


def test_a_place_holds_what_is_there_now():
    """FSDP puts other parameters into the modules, and another tool may take one away."""
    model = Shared()
    places = slots(model)
    new = nn.Parameter(torch.ones(2, 2))
    model.body[0].weight = new
    model.own = None
    del model.again.bias
    assert places["body.0.weight"].parameter is places["again.weight"].parameter is new
    assert places["body.1.weight"].parameter is not new, "it shared the old one"
    assert places["own"].parameter is None
    assert places["body.0.bias"].parameter is None
    wanted = [places[name] for name in ("own", "again.weight", "body.0.bias", "body.1.weight")]
    assert [id(p) for p in present(wanted)] == [id(new), id(model.body[1].weight)]


def test_a_module_may_hold_a_parameter_twice():
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(1))
    model.second = model.first
    places = slots(model)
    assert set(places) == {"first", "second"}
    assert places["second"].parameter is model.first


def test_two_places_are_two_even_if_they_hold_the_same():
    holder: dict[str, nn.Parameter | None] = {"weight": nn.Parameter(torch.zeros(1))}
    assert Slot("a.weight", holder, "weight") != Slot("a.weight", holder, "weight")
