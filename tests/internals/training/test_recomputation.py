"""Which forward a call in a backward belongs to: that whose part of the graph asks for it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdp import Phase
from rdp.training.recomputation import Calls, in_reentrant_checkpoint
from rdp.training.step import Draw, Forward, Step, next_node


class Nothing:
    """Probes that see nothing."""

    def gradients(self) -> list[None]:
        return []


class Asks(torch.autograd.Function):
    """The identity, which calls something in its backward, as a checkpoint does to recompute."""

    @staticmethod
    def forward(ctx, x: Tensor, ask: Callable[[], object]) -> Tensor:
        ctx.ask = ask
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.ask()
        return gradient, None


def leaf() -> Tensor:
    return torch.zeros((), requires_grad=True)


class Training:
    """Forwards of a step, in whose backwards it is asked which of them is recomputed."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.step = Step(0, Phase.DROP, 0, Nothing(), {})
        self.answers: list[Forward | None] = []

    def ask(self) -> None:
        self.answers.append(self.calls.of_backward(self.step))

    def forward(self, ask: Callable[[], object] | None = None) -> tuple[Forward, Tensor]:
        """A forward of two nodes that ask in backward."""
        masks = torch.ones(1, 1, dtype=torch.bool)
        forward = Forward(Phase.DROP, len(self.step.forwards), Draw(0, 1), masks, masks[:, 0])
        self.step.forwards.append(forward)
        first, x = next_node(), leaf()
        for _ in range(2):
            x = Asks.apply(x, ask or self.ask)
        forward.nodes = (first, next_node())
        return forward, x


@given(st.permutations(range(3)))
def test_a_backward_belongs_to_the_forward_that_made_its_graph(order):
    """However many forwards are pending, and in whatever order their backwards run."""
    training = Training()
    made = [training.forward() for _ in range(3)]
    for number in order:
        training.answers.clear()
        made[number][1].backward()
        assert training.answers == [made[number][0]] * 2


def test_a_graph_made_in_a_recomputation_belongs_to_the_forward_that_is_recomputed():
    """Nested checkpoints: the inner one's nodes are younger than every forward."""
    training = Training()

    def recompute() -> None:
        training.ask()
        with torch.enable_grad():
            x = Asks.apply(leaf(), training.ask)
        x.backward()

    first, x = training.forward(recompute)
    training.forward()
    x.backward()
    assert training.answers == [first] * 4


def test_after_its_step_nothing_of_a_forward_is_recomputed():
    training = Training()
    _, x = training.forward()
    x.backward(retain_graph=True)
    training.step = Step(1, Phase.FREEZE, 0, Nothing(), {})
    training.answers.clear()
    x.backward()
    training.ask()
    assert training.answers == [None] * 3, "nor is anything outside of a backward"


def test_a_graph_from_before_or_after_a_forward_is_not_of_it():
    training = Training()
    before = Asks.apply(leaf(), training.ask)
    training.forward()
    after = Asks.apply(leaf(), training.ask)
    for x in (before, after):
        x.backward()
    assert training.answers == [None, None]


def test_a_reentrant_checkpoint_is_told_from_others():
    answers: list[bool] = []

    def block(x: Tensor) -> Tensor:
        answers.append(in_reentrant_checkpoint())
        return x.square()

    for reentrant in (True, False):
        checkpoint(block, torch.ones((), requires_grad=True), use_reentrant=reentrant).backward()
    assert answers == [False, True, False, False], "each runs it twice, in forward and in backward"
    assert not in_reentrant_checkpoint()


class Interrupted(nn.Module):
    """Forgets, in the middle of a call within a call, those of its calls that are over."""

    def __init__(self, calls: Calls, depth: int) -> None:
        super().__init__()
        self.calls, self.depth = calls, depth

    def forward(self, depth: int) -> None:
        if depth < self.depth:
            self(depth + 1)
        else:
            self.calls.forget_interrupted(self)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_calls_that_were_interrupted_are_forgotten_and_those_that_go_on_are_not(depth):
    """A call that begins finds those of its module that are above it on the stack, and no others may be running."""
    training = Training()
    over, outer, inner = (training.forward()[0] for _ in range(3))
    training.calls.running = [over, None, *[outer, inner][: depth - 1]]
    Interrupted(training.calls, depth)(1)
    assert training.calls.running == [outer, inner][: depth - 1]
    assert [forward.spent for forward in (over, outer, inner)] == [True, False, False]


def test_a_copy_knows_of_no_call():
    calls = Calls()
    calls.running.append(None)
    assert pickle.loads(pickle.dumps(calls)).running == []
