"""Optimizers that move parameters between their steps, or evaluate the model twice in one (`laws.twins`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from laws.training import identical, loss, snapshot
from laws.twins import CASE, STEPS, Twins
from torch import Tensor, nn
from torch.optim import Optimizer

import rdp

# -- schedule-free ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free(name: str) -> None:
    """Between steps it goes to the average and back, which moves frozen parameters too, and equally in both twins."""
    schedulefree = pytest.importorskip("schedulefree")
    twins = Twins(lambda ps: getattr(schedulefree, name)(ps, lr=0.01, weight_decay=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)  # going to the average is no unannounced step
        for number in range(STEPS):
            twins.optimizer.train()
            twins.plain.train()
            twins.step(number)
            twins.optimizer.eval()
            twins.plain.eval()
            twins.check_equal()
            before = twins.handle.state_dict()
            with torch.no_grad():
                twins.model.eval()(twins.model.rows(4, 99))
            twins.model.train()
            assert identical(twins.handle.state_dict(), before)
    twins.check_shown()


def test_the_wrapper_of_schedule_free_is_refused() -> None:
    """It is no `torch.optim.Optimizer`, and moves parameters around the step of the one that it holds."""
    schedulefree = pytest.importorskip("schedulefree")
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(rdp.ArgumentError, match=r"wrap needs a torch.optim.Optimizer; got ScheduleFreeWrapper"):
        handle.wrap(optimizer)


# -- SAM -------------------------------------------------------------------------------------------------------------


class SAM(Optimizer):
    """Sharpness-aware minimization: climb to a worse point nearby, and descend with the gradient found there.

    Source: Foret et al. (2021), and the interface of github.com/davda54/sam.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], base: type[Optimizer], rho: float, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho} | options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        for p in trained:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=self.defaults["rho"] / (norm.item() + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """As davda54's: the first gradient is there already, or the closure is called for it."""
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            with torch.enable_grad():
                closure()
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            value = closure()
        self.second_step()
        return value


def sam_oracle(model: nn.Module, sam: SAM, x: Tensor, masks: Tensor, phase: rdp.Phase, live: set[str]) -> None:
    """SAM of the objective that the masks define, on the live parameters."""

    def gradients() -> None:
        model.zero_grad()
        loss(CASE.oracle(model, x, masks, phase)).backward()
        for name, p in model.named_parameters():
            if name not in live:
                p.grad = None

    gradients()
    sam.first_step()
    gradients()
    sam.second_step()


def make_sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.05, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("usage", ["closure alone", "backward, then closure", "two steps"])
def test_sam(usage: str) -> None:
    """Both forwards of a step have the same masks, so both gradients are of the same objective."""
    model, plain_model = CASE.model(), CASE.model()
    handle = CASE.attach(model)
    sam, plain = make_sam(model), make_sam(plain_model)
    if usage == "two steps":
        optimizer = sam.base_optimizer = handle.wrap(sam.base_optimizer)
    else:
        optimizer = handle.wrap(sam)
    frozen_ever = 0
    for number in range(STEPS):
        x, phase, seen = model.rows(4, number), handle.phase, []

        def closure(x=x, seen=seen) -> Tensor:
            value = loss(model(x))
            value.backward()
            seen.append(handle.masks)
            return value

        before = snapshot(model, sam.base_optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error", rdp.RdpWarning)
            if usage == "two steps":
                optimizer.zero_grad()
                closure()
                sam.first_step()
                optimizer.zero_grad()  # the wrapped optimizer's, so that the handle knows: the same step once more
                closure()
                sam.second_step()
            else:
                optimizer.zero_grad()
                if usage == "backward, then closure":
                    closure()
                optimizer.step(closure)
        assert len(seen) == 2
        assert identical(seen[0], seen[1])
        assert handle.step_count == number + 1
        live = CASE.live(seen[0], phase)
        after = snapshot(model, sam.base_optimizer)
        assert all(identical(before[name], after[name]) for name in before.keys() - live)
        frozen_ever += len(before.keys() - live)
        sam_oracle(plain_model, plain, x, seen[0], phase, live)
        torch.testing.assert_close(list(model.parameters()), list(plain_model.parameters()))
    assert frozen_ever > 0
    assert handle.check().ok, str(handle.check())
