"""The optimizer by itself: what it asks of a run, what it hides, and what it leaves to the wrapped one.

The run is a stand-in that freezes the parameters it is told to and writes down what is asked of it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rdp


class Handle:
    """Freezes `frozen`, and writes down; it stands for its run, its step and its watch, too."""

    def __init__(self, *frozen: Tensor) -> None:
        self.frozen = frozen
        self.asked: list[Any] = []
        self.forwards: list[Any] = ["before"]
        self._run = self.step = self.watch = self

    def settle(self) -> frozenset[int]:
        self.asked.append("settle")
        return frozenset(id(p) for p in self.frozen)

    def evaluates(self, before: set[Any]) -> None:
        self.asked.append(("evaluates", before))
        self.forwards = [*self.forwards, "of the closure"]

    def stepped(self, optimizer: rdp.MaskedOptimizer, frozen: frozenset[int]) -> None:
        assert frozen == {id(p) for p in self.frozen}
        self.asked.append(("stepped", optimizer))

    def forget(self) -> None:
        self.asked.append("forget")


def parameters(count: int = 2) -> list[nn.Parameter]:
    """Each of the value 1 and with the gradient 1."""
    made = [nn.Parameter(torch.ones(3)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones(3)
    return made


def test_a_step_settles_first_hides_what_is_frozen_and_gives_it_back():
    live, frozen = parameters()
    handle = Handle(frozen)
    seen = []
    inner = torch.optim.SGD([live, frozen], lr=0.5, weight_decay=0.1)
    inner.register_step_pre_hook(lambda *_: seen.extend([live.grad, frozen.grad]))
    optimizer = rdp.MaskedOptimizer(inner, handle)
    gradient = frozen.grad
    assert optimizer.step() is None
    assert handle.asked == ["settle", ("stepped", optimizer)]
    assert seen == [live.grad, None]
    assert frozen.grad is gradient
    assert frozen.tolist() == [1.0] * 3
    assert live.tolist() == pytest.approx([1 - 0.5 * 1.1] * 3)


class Twice(torch.optim.SGD):
    """Evaluates its closure twice and takes a further argument, as some optimizers do."""

    def step(self, closure: Any = None, *, scale: float = 1.0) -> Any:
        results = [closure(), closure()] if closure is not None else []
        super().step()
        return [scale, *results]


def test_each_call_of_a_closure_begins_with_the_forwards_from_before_the_step_and_settles_after_its_own():
    live, frozen = parameters()
    handle = Handle(frozen)
    optimizer = rdp.MaskedOptimizer(Twice([live, frozen], lr=0.5), handle)

    def closure() -> float:
        handle.asked.append("closure")
        assert frozen.grad is not None, "a closure sees no hidden gradients"
        return 3.0

    assert optimizer.step(closure, scale=2.0) == [2.0, 3.0, 3.0]
    evaluation = [("evaluates", {"before"}), "closure", "settle"]
    assert handle.asked == [*evaluation, *evaluation, ("stepped", optimizer)]
    assert frozen.tolist() == [1.0] * 3
    assert optimizer.step(scale=4.0) == [4.0]


@pytest.mark.parametrize("closure", [None, lambda: 1.0])
def test_a_step_that_raises_gives_gradients_back_and_is_no_step(closure):
    live, frozen = parameters()
    handle = Handle(frozen)

    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if closure is not None:
                closure()
            assert frozen.grad is None
            raise KeyboardInterrupt

    optimizer = rdp.MaskedOptimizer(Raises([live, frozen], lr=0.5), handle)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert frozen.grad is not None
    assert ("stepped", optimizer) not in handle.asked


def test_lbfgs_evaluates_and_ends_with_frozen_parameters_where_they_were():
    """Its direction, built from earlier steps in which they were live, moves them although they have no gradient."""
    weights = [nn.Parameter(torch.full((2,), value)) for value in (3.0, -2.0)]
    handle = Handle()
    inner = torch.optim.LBFGS(weights, lr=0.1, max_iter=4, tolerance_change=0.0, tolerance_grad=0.0)
    optimizer = rdp.MaskedOptimizer(inner, handle)
    evaluated: list[list[float]] = []

    def closure() -> Tensor:
        evaluated.append(weights[1].tolist())
        optimizer.zero_grad()
        value = ((weights[0] + weights[1]) ** 2 + weights[0] ** 4 + weights[1] ** 4).sum()
        value.backward()
        return value

    optimizer.step(closure)
    moved = weights[1].tolist()
    assert moved != [-2.0, -2.0]
    handle.frozen = (weights[1],)
    evaluated.clear()
    optimizer.step(closure)
    assert len(evaluated) > 2
    assert evaluated == [moved] * len(evaluated)
    assert weights[1].tolist() == moved
    assert handle.asked[-1] == "forget", "the moves in between are no steps that somebody forgot to announce"


def test_fused_sgd_takes_a_first_gradient_that_comes_late():
    """Plain fused SGD makes all momentum buffers in its first step, and fails on a parameter that was frozen in it."""
    late, usual, never = parameters(3)
    never.grad = None
    handle = Handle(late)
    inner = torch.optim.SGD([late, usual, never], lr=0.5, momentum=0.9, fused=True)
    optimizer = rdp.MaskedOptimizer(inner, handle)
    optimizer.step()
    handle.frozen = ()
    optimizer.step()
    assert late.tolist() == pytest.approx([1 - 0.5] * 3)
    assert usual.tolist() == pytest.approx([1 - 0.5 * (1 + 1.9)] * 3)
    assert inner.state[late]["momentum_buffer"].tolist() == [1.0] * 3
    assert "momentum_buffer" not in inner.state.get(never, {})


@pytest.mark.parametrize("fused", [False, True])
def test_momentum_is_made_by_the_optimizer_itself_wherever_it_can(fused):
    """A first gradient enters the buffer whole, and not dampened as it would enter one of zeros."""
    late, usual = parameters()
    handle = Handle(*([] if fused else [late]))
    inner = torch.optim.SGD([late, usual], lr=0.5, momentum=0.9, dampening=0.5, fused=fused)
    optimizer = rdp.MaskedOptimizer(inner, handle)
    for _ in range(1 if fused else 2):
        optimizer.step()
        handle.frozen = ()
    assert inner.state[late]["momentum_buffer"].tolist() == [1.0] * 3


@pytest.mark.parametrize("options", [{"fused": True}, {"momentum": 0.9}])
def test_no_momentum_is_made_where_the_optimizer_would_make_none_or_by_itself(options):
    late, usual = parameters()
    inner = torch.optim.SGD([late, usual], lr=0.5, **options)
    rdp.MaskedOptimizer(inner, Handle(late)).step()
    assert inner.state.get(late, {}).get("momentum_buffer") is None


class Averaging(torch.optim.SGD):
    """Like the schedule-free optimizers, moves parameters when told which of two averages to hold."""

    __beta = 0.9
    __array__ = "not to be seen"
    momentum__ = 0.1

    def train(self) -> str:
        return "training"

    def eval(self) -> str:
        return "evaluating"

    def describe(self, *args: object, **kwargs: object) -> tuple:
        return args, kwargs


def test_moves_between_averages_are_no_forgotten_steps_and_other_methods_are_just_called():
    handle = Handle()
    optimizer = rdp.MaskedOptimizer(Averaging(parameters(), lr=0.1), handle)
    assert optimizer.describe(1, a=2) == ((1,), {"a": 2})
    assert handle.asked == []
    assert optimizer.train() == "training"
    assert optimizer.eval() == "evaluating"
    assert handle.asked == ["forget", "forget"]
    optimizer.optimizer.train = False  # no method of that kind
    assert optimizer.train is False


def test_attributes_are_those_of_the_wrapped_one_but_for_protocols_and_its_own():
    inner = Averaging(parameters(), lr=0.1)
    optimizer = rdp.MaskedOptimizer(inner, Handle())
    assert optimizer._Averaging__beta == 0.9
    assert optimizer.momentum__ == 0.1
    assert getattr(inner, "__array__") == "not to be seen"  # noqa: B009
    for name in ("__array__", "__len__"):
        with pytest.raises(AttributeError, match=rf"^{name}$"):
            getattr(optimizer, name)
    optimizer.note = "on the wrapped one"
    assert inner.note == "on the wrapped one"
    bare = rdp.MaskedOptimizer.__new__(rdp.MaskedOptimizer)
    for name in ("optimizer", "_run", "_hidden"):  # asked for while unpickling, before there is a wrapped one to ask
        with pytest.raises(AttributeError, match=rf"^{name}$"):
            getattr(bare, name)


def test_what_is_patched_onto_step_stays_here():
    """Schedulers count calls of `step` so; on the wrapped one, frozen parameters would be moved."""
    inner = torch.optim.SGD(parameters(), lr=0.1)
    optimizer = rdp.MaskedOptimizer(inner, Handle())
    optimizer.step = lambda: "patched"
    assert optimizer.step() == "patched"
    assert "step" not in vars(inner)


def test_hooks_are_registered_with_the_wrapped_one_arguments_and_all():
    inner = torch.optim.SGD(parameters(), lr=0.1)
    optimizer = rdp.MaskedOptimizer(inner, Handle())
    called = []
    optimizer.register_state_dict_pre_hook(lambda *_: called.append(1))
    first = optimizer.register_state_dict_pre_hook(lambda *_: called.append(0), prepend=True)
    inner.state_dict()
    first.remove()
    inner.state_dict()
    assert called == [0, 1, 1]


def test_a_scaler_does_not_see_that_a_fused_optimizer_could_skip_by_itself():
    """It would step it regardless of infs, and the phase would advance."""
    inner = torch.optim.AdamW(parameters(), lr=0.1, fused=True)
    assert inner._step_supports_amp_scaling
    with pytest.raises(AttributeError, match=r"^_step_supports_amp_scaling$"):
        rdp.MaskedOptimizer(inner, Handle())._step_supports_amp_scaling  # noqa: B018


def test_a_copy_wraps_the_same_optimizer_for_the_same_run():
    handle = Handle()
    optimizer = rdp.MaskedOptimizer(torch.optim.SGD(parameters(), lr=0.1), handle)
    twin = copy.copy(optimizer)
    assert isinstance(twin, rdp.MaskedOptimizer)
    assert twin.optimizer is optimizer.optimizer
    twin.step()
    assert handle.asked == ["settle", ("stepped", twin)]
