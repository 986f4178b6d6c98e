"""The law of optimizers: under RDP each is the plain optimizer on the live parameters alone.

The oracle is the plain optimizer on a twin model, whose frozen parameters get `None` for a gradient. What is frozen
follows from the masks by the definition of DROP and FREEZE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import identical, loss, snapshot

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), mode="batch", decay="constant", seed=3)
STEPS = 8

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def objective(output: Tensor) -> Tensor:
    """Not linear, so that it has second derivatives."""
    return loss(output.square())


@dataclass
class Twins:
    """An attached model and a plain one with the same parameters, each with its optimizer.

    Args:
        make: Makes an optimizer of parameters.
        case: The model.
        takes: Chooses the parameters of the optimizer; None is all.
        make_plain: Makes the plain one, if it is to be another.
        exact: Must they agree bit by bit, or up to rounding?
        set_to_none: How the attached model's gradients are cleared. By default they become zeros, which move a
            parameter by momentum and decay unless they are hidden.
    """

    make: Make
    case: Case = CASE
    takes: Callable[[str, nn.Parameter], bool] | None = None
    make_plain: Make | None = None
    exact: bool = True
    set_to_none: bool = False

    def __post_init__(self) -> None:
        self.model, self.plain_model = self.case.model(), self.case.model()
        self.handle = self.case.attach(self.model)
        with torch.random.fork_rng():
            self.inner = self.make(self._chosen(self.model))
            self.optimizer = self.handle.wrap(self.inner)
        with torch.random.fork_rng():
            self.plain = (self.make_plain or self.make)(self._chosen(self.plain_model))
        self.frozen_ever = 0

    def _chosen(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if self.takes is None or self.takes(name, p)]

    def step(self, number: int, create_graph: bool = False, **arguments: Any) -> None:
        """One step of both, and what must be true of it."""
        self.optimizer.zero_grad(self.set_to_none)
        objective(self.model(self.model.rows(4, number))).backward(create_graph=create_graph)
        live = self.case.live(self.handle.masks, self.handle.phase)
        self._share_gradients(live, create_graph, number)
        before = snapshot(self.model, self.inner)
        self._both_step(**arguments)
        after = snapshot(self.model, self.inner)
        for name in before.keys() - live:
            assert identical(before[name], after[name]), f"{name} is frozen and moved"
            self.frozen_ever += 1
        self.check_equal()

    def _share_gradients(self, live: set[str], create_graph: bool, number: int) -> None:
        if create_graph:  # a gradient with a graph cannot be copied to another model: its twin computes its own
            out = self.case.oracle(
                self.plain_model, self.plain_model.rows(4, number), self.handle.masks, self.handle.phase
            )
            self.plain_model.zero_grad()
            objective(out).backward(create_graph=True)
        for (name, p), twin in zip(self.model.named_parameters(), self.plain_model.parameters(), strict=True):
            if name not in live:
                twin.grad = None
            elif not create_graph:
                twin.grad = None if p.grad is None else p.grad.clone()

    def _both_step(self, **arguments: Any) -> None:
        with torch.random.fork_rng():  # some optimizers draw numbers
            self.plain.step(**arguments)
        self.optimizer.step(**arguments)

    def check_equal(self) -> None:
        """The two models and optimizers are the same."""
        ours, theirs = snapshot(self.model, self.inner), snapshot(self.plain_model, self.plain)
        for name in ours:
            if self.exact:
                assert identical(ours[name], theirs[name]), f"{name} is not what the plain optimizer makes of it"
            else:
                torch.testing.assert_close(ours[name], theirs[name])

    def run(self, steps: int = STEPS, **arguments: Any) -> None:
        """Several steps, in which something was frozen."""
        for number in range(steps):
            self.step(number, **arguments)
        assert self.handle.step_count == steps
        self.check_shown()

    def check_shown(self) -> None:
        """Something was frozen, and the handle finds nothing wrong with this loop."""
        assert self.frozen_ever > 0, "nothing was ever frozen, so this shows nothing"
        inside = {name for branch in self.handle.branches for name in branch.parameters}
        if self.takes is None or all(self.takes(name, self.model.get_parameter(name)) for name in inside):
            checkup = self.handle.check()
            assert checkup.ok, str(checkup)
