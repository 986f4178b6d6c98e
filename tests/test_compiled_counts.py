"""A compiled model obeys the same rule of what counts for a step as one that is not, with one graph for each phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import identical, loss, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import rdp

ROWS = 4


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@dataclass
class Loop:
    """A training run, and what was seen in it."""

    case: Case
    compiled: bool
    masks: list[Any] = field(default_factory=list)
    """The phase and the masks of every forward, in order."""
    frozen: list[set[str]] = field(default_factory=list)
    """In every step, the parameters that did not move."""

    def __post_init__(self) -> None:
        self.model = self.case.model()
        self.handle = self.case.attach(self.model, example_inputs=self.model.rows(2, 0))
        self.inner = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        self.optimizer = self.handle.wrap(self.inner)
        self.counter = CompileCounterWithBackend("aot_eager")
        self.call: nn.Module = self.model
        if self.compiled:
            self.call = torch.compile(self.model, backend=self.counter, fullgraph=True)

    def forward(self, number: int) -> Tensor:
        """The loss of a batch."""
        value = loss(self.call(self.model.rows(ROWS, number)))
        self.masks.append((self.handle.phase, self.handle.masks))
        return value

    def step(self) -> None:
        """One in which frozen parameters and what the optimizer keeps of them are bit-identical."""
        frozen, before = set(self.handle.frozen), snapshot(self.model, self.inner)
        self.optimizer.step()
        after = snapshot(self.model, self.inner)
        assert {name for name in before if identical(before[name], after[name])} == frozen
        self.frozen.append(frozen)

    def graphs(self) -> int:
        """How many there are of the model; there is another one that draws masks."""
        names = [[node.name for node in graph.graph.nodes if node.op == "placeholder"] for graph in self.counter.graphs]
        return sum(any("weight" in name for name in some) for some in names)


def every_batch(loop: Loop) -> None:
    for number in range(8):
        loop.optimizer.zero_grad()
        loop.forward(number).backward()
        loop.step()


def skipped_while_its_loss_is_alive(loop: Loop) -> None:
    """The loop's own variable holds the graph of the nan batch until the next loss is there."""
    for number in range(12):
        loop.optimizer.zero_grad()
        value = loop.forward(number)
        if number % 3 == 0:
            continue
        value.backward()
        loop.step()


def logged(loop: Loop) -> None:
    """A loss that is kept for good, and never run backwards."""
    kept = []
    for number in range(8):
        loop.optimizer.zero_grad()
        kept.append(loop.forward(100 + number))
        loop.forward(number).backward()
        loop.step()


def thrown_away_by_the_optimizer(loop: Loop) -> None:
    for number in range(8):
        loop.optimizer.zero_grad()
        if number % 3 == 0:
            (loop.forward(100 + number) * float("nan")).backward()
            loop.optimizer.zero_grad()
        loop.forward(number).backward()
        loop.step()


def thrown_away_by_the_model(loop: Loop) -> None:
    for number in range(8):
        loop.model.zero_grad(set_to_none=False)
        if number % 3 == 0:
            (loop.forward(100 + number) * float("nan")).backward()
            loop.model.zero_grad(set_to_none=False)
        loop.forward(number).backward()
        loop.step()


def accumulated(loop: Loop) -> None:
    for number in range(8):
        loop.optimizer.zero_grad()
        for part in range(2):
            loop.forward(2 * number + part).backward()
        loop.step()


def accumulated_in_one_backward(loop: Loop) -> None:
    for number in range(8):
        loop.optimizer.zero_grad()
        (loop.forward(2 * number) + loop.forward(2 * number + 1)).backward()
        loop.step()


def run_backwards_twice(loop: Loop) -> None:
    for number in range(8):
        loop.optimizer.zero_grad()
        value = loop.forward(number)
        (0.25 * value).backward(retain_graph=True)
        loop.model.zero_grad()
        value.backward()
        loop.step()


LOOPS = [
    every_batch,
    skipped_while_its_loss_is_alive,
    logged,
    thrown_away_by_the_optimizer,
    thrown_away_by_the_model,
    accumulated,
    accumulated_in_one_backward,
    run_backwards_twice,
]


@pytest.mark.parametrize(
    ("train", "mode"),
    [
        pytest.param(train, mode, id=f"{mode}-{train.__name__}", marks=pytest.mark.slow if i % 2 == k else ())
        for i, train in enumerate(LOOPS)
        for k, mode in enumerate(("row", "batch"))
    ],
)
def test_a_compiled_loop_counts_and_freezes_as_the_same_loop_in_python(train, mode):
    case = Case(BlockMLP, (("plain", "norm"),), mode=mode, decay="constant", seed=3)
    python, compiled = (Loop(case, how) for how in (False, True))
    for loop in (python, compiled):
        train(loop)
        assert loop.handle.step_count == 8
    assert identical([masks for _, masks in compiled.masks], [masks for _, masks in python.masks])
    assert compiled.frozen == python.frozen
    if mode == "batch":
        assert any(python.frozen), "something was frozen"
    torch.testing.assert_close(compiled.model.state_dict(), python.model.state_dict())
    assert compiled.handle.state_dict() == python.handle.state_dict()
    assert compiled.graphs() == 2, "one for DROP and one for FREEZE"


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_freeze_replays_the_forwards_of_drop_that_counted_and_no_others(mode):
    case = Case(BlockMLP, (("plain", "norm"),), mode=mode, decay="constant", seed=9)
    loop = Loop(case, compiled=True)
    for cycle in range(4):
        learnt: dict[rdp.Phase, list[Tensor]] = {rdp.Phase.DROP: [], rdp.Phase.FREEZE: []}
        for phase, masks in learnt.items():
            assert loop.handle.phase is phase
            loop.optimizer.zero_grad()
            dropped = [loop.forward(50)] if cycle % 2 else []
            for part in range(2):
                loop.forward(part).backward()
                masks.append(loop.handle.masks)
                dropped.clear()
            loop.step()
        assert identical(*learnt.values())
        assert not torch.equal(*learnt[rdp.Phase.DROP])
