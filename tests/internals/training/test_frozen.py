"""Which branches learn, which parameters are frozen, where these are kept, and which of them are probed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rdp import Phase
from rdp.branches import Branch
from rdp.training.frozen import Frozen, Probes, Slot, slots
from rdp.training.step import Draw, Forward


def present(places):
    return [slot.holder.get(slot.key) for slot in places]


# -- places -----------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A module under two names, a parameter under two, one of the root's own twice, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        self.again = self.body[0]
        self.body[1].weight = self.again.weight
        self.own = self.twice = nn.Parameter(torch.zeros(1))


def test_every_name_of_every_parameter_has_a_place():
    model = Shared()
    expected = dict(model.named_parameters(remove_duplicate=False))
    places = slots(model)
    assert len(expected) == 7
    assert dict(zip(places, present(places.values()), strict=True)) == expected
    assert all(slot.name == name for name, slot in places.items())


def test_a_place_holds_what_is_there_now():
    """FSDP puts other parameters into the modules, and another tool may take one away."""
    model = Shared()
    places = slots(model)
    new = nn.Parameter(torch.ones(2, 2))
    model.body[0].weight = new
    model.own = None
    del model.again.bias
    wanted = [places[name] for name in ("own", "again.weight", "body.0.weight", "body.0.bias", "body.1.weight")]
    expected = [None, new, new, None, model.body[1].weight]
    assert [id(p) for p in present(wanted)] == [id(p) for p in expected]


def test_two_places_are_two_even_if_they_hold_the_same():
    holder: dict[str, nn.Parameter | None] = {"weight": nn.Parameter(torch.zeros(1))}
    assert Slot("a.weight", holder, "weight") != Slot("a.weight", holder, "weight")


# -- which branches learn ---------------------------------------------------------------------------------------------


def branches(rates: list[float], inside: list[tuple[int, ...]]) -> list[Branch]:
    return [
        Branch(f"b{i}", "", "identity", (), rate=rate, inside=around)
        for i, (rate, around) in enumerate(zip(rates, inside, strict=True))
    ]


@given(st.data(), st.sampled_from(Phase))
def test_a_branch_learns_if_some_row_reaches_it_through_all_branches_around_it(data, phase):
    """Enclosing branches may come before or after the enclosed ones, be enclosed themselves, and run side by side."""
    count = data.draw(st.integers(1, 5))
    order = data.draw(st.permutations(range(count)))
    inside: list[tuple[int, ...]] = [()] * count
    for position, branch in enumerate(order[1:], start=1):
        inside[branch] = tuple(data.draw(st.lists(st.sampled_from(order[:position]), max_size=2, unique=True)))
    rates = data.draw(st.lists(st.sampled_from([0.0, 0.5]), min_size=count, max_size=count))
    rows = data.draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=rows, max_size=rows)
    masks = (
        data.draw(st.lists(row, min_size=count, max_size=count))
        if phase is not Phase.PLAIN
        else [[True] * rows] * count
    )

    def learns(branch: int, row: int) -> bool:
        here = rates[branch] == 0 or masks[branch][row] == (phase is not Phase.FREEZE)
        around = inside[branch]
        return here and (not around or any(learns(one, row) for one in around))

    live = Frozen(branches(rates, inside), {}).live(torch.tensor(masks), phase)
    assert live.tolist() == [any(learns(branch, row) for row in range(rows)) for branch in range(count)]
    assert live.dtype == torch.bool


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_three_nested_branches_the_innermost_needs_all(order):
    """Whichever comes first; the middle one is decided before the inner one asks it."""
    outer, middle, inner = order
    inside: list[tuple[int, ...]] = [()] * 3
    inside[middle], inside[inner] = (outer,), (middle,)
    frozen = Frozen(branches([0.5] * 3, inside), {})
    for keep in itertools.product([False, True], repeat=3):
        live = frozen.live(torch.tensor(keep)[:, None], Phase.DROP)
        assert live[outer] == keep[outer]
        assert live[middle] == (keep[outer] and keep[middle])
        assert live[inner] == all(keep)


def forward(*live: bool) -> Forward:
    return Forward(Phase.DROP, 0, Draw(0, 1), torch.ones(len(live), 1, dtype=torch.bool), torch.tensor(live))


def test_a_branch_is_live_in_a_step_if_it_is_so_in_one_of_its_forwards():
    frozen = Frozen(branches([0.5] * 3, [()] * 3), {})
    live = frozen.live_in_any([f.live for f in (forward(True, False, False), forward(False, False, True))])
    assert live.tolist() == [True, False, True]


def test_without_forwards_everything_learns():
    """Whatever moves then was not decided by a mask."""
    live = Frozen(branches([0.5] * 2, [()] * 2), {}).live_in_any([])
    assert live.tolist() == [True, True]
    assert live.dtype == torch.bool


def test_what_learns_is_known_on_the_cpu_whatever_the_default_device():
    masks = torch.tensor([[False], [True]])
    with torch.device("meta"):
        frozen = Frozen(branches([0.0, 0.5], [None, None]), {})
        assert frozen.live(masks, Phase.FREEZE).tolist() == [True, False]
        assert frozen.live_in_any([]).tolist() == [True, True]


# -- parameters -------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Parameters of these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))


def owning(*groups: tuple[str, ...], rate: float = 0.5) -> list[Branch]:
    return [Branch(f"b{i}", "", "identity", group, rate=rate) for i, group in enumerate(groups)]


@pytest.mark.parametrize("live", list(itertools.product([False, True], repeat=2)))
def test_a_parameter_is_frozen_if_none_of_its_branches_is_live(live):
    model = Named("a", "shared", "b", "outside", "gone")
    frozen = Frozen(owning(("a", "shared", "gone"), ("shared", "b")), slots(model))
    model.gone = None
    expected = {"a": not live[0], "b": not live[1], "shared": not any(live)}
    ids = frozen.parameters(torch.tensor(live))
    assert ids == {id(model.get_parameter(name)) for name, still in expected.items() if still}


def test_trainable_are_the_parameters_of_branches_that_learn_at_all():
    model = Named("a", "b", "outside", "fixed", "gone")
    frozen = Frozen(owning(("a", "fixed"), ("b", "gone")), slots(model))
    model.fixed.requires_grad_(False)
    model.gone = None
    assert list(map(id, frozen.trainable())) == [id(model.a), id(model.b)]


# -- probes -----------------------------------------------------------------------------------------------------------


def probed(model: nn.Module, groups: list[tuple[str, ...]], held: dict[str, Any] | None = None) -> list[str]:
    """The names of the parameters by whose gradients something is seen, in order."""
    probes = Probes()
    probes.choose(model, owning(*groups), held or {})
    named = dict(model.named_parameters()) | (held or {})
    seen: dict[int, str] = {}
    for name, parameter in named.items():
        parameter.grad = torch.zeros_like(parameter)
        (seen_at,) = [i for i, g in enumerate(probes.gradients()) if g is not None] or [None]
        if seen_at is not None:
            seen[seen_at] = name
        parameter.grad = None
    assert len(seen) == len(probes.gradients())
    return [seen[i] for i in range(len(seen))]


def test_a_few_are_probed_from_stem_and_head_and_of_some_branches():
    outside = [f"p{i}" for i in range(11)]
    inside = [(f"b{i}", f"c{i}") for i in range(9)]
    model = Named(*outside[:5], *itertools.chain(*inside), *outside[5:])
    assert probed(model, inside) == ["p0", "p1", "p2", "p3", "p7", "p8", "p9", "p10", "b0", "b3", "b6"]


def test_where_there_is_nothing_outside_of_branches_each_is_probed():
    """A branch may be dropped, so that no other shows that a backward ran."""
    groups = [(f"b{i}", f"c{i}") for i in range(9)]
    assert probed(Named(*itertools.chain(*groups)), groups) == [f"b{i}" for i in range(9)]


def test_what_is_not_trained_is_not_probed_unless_nothing_is():
    model = Named("p0", "p1", "b0", "b1")
    model.p0.requires_grad_(False)
    model.b0.requires_grad_(False)
    assert probed(model, [("b0", "b1")]) == ["p1", "b1"]
    model.requires_grad_(False)
    assert probed(model, [("b0", "b1")]) == ["p0", "p1", "b0"]


def test_the_parameters_that_optimizers_hold_are_probed_in_the_place_of_those_in_the_modules():
    """FSDP keeps gradients there."""
    held = nn.Parameter(torch.zeros(2))
    model = Named("p0", "p1")
    probes = Probes()
    probes.choose(model, [], {"p1": held})
    model.p1.grad = torch.zeros(1)
    assert probes.gradients() == [None, None]
    held.grad = torch.zeros(2)
    assert probes.gradients() == [None, (id(held.grad), 0)]


def test_another_gradient_is_told_from_the_same_and_a_changed_from_an_unchanged_one():
    model, probes = Named("p"), Probes()
    probes.choose(model, [], {})
    seen: list[Any] = [probes.gradients()]
    kept: list[Tensor] = []
    for _ in range(2):
        model.p.grad = torch.zeros(1)
        kept.append(model.p.grad)
        seen.append(probes.gradients())
        assert probes.gradients() == seen[-1]
        model.p.grad += 1
        seen.append(probes.gradients())
    assert all(a != b for a, b in itertools.combinations(seen, 2))


def test_of_a_gradient_with_a_local_part_that_part_is_looked_at():
    """FSDP adds to it, which the DTensor around it does not show."""
    model, probes = Named("p"), Probes()
    probes.choose(model, [], {})
    model.p.grad = torch.zeros(1)
    model.p.grad._local_tensor = local = torch.zeros(1)
    local += 1
    assert probes.gradients() == [(id(local), 1)]
