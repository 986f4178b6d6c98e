from __future__ import annotations

import copy

import pytest
import torch
from engine import Config
from engine.cost import matched_epochs, relative_flops
from torch import Tensor, nn


class Chain(nn.Module):
    """Branches of equal cost and nothing else, so that the cost is known."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(16, 16) for _ in range(branches)])

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


class Normalized(nn.Module):
    """`x + f(x)` with BatchNorm in `f`."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


IMAGES, LABELS = torch.randn(2, 16), torch.zeros(2, dtype=torch.long)


def test_standard_costs_one() -> None:
    assert relative_flops(Chain(2), Config(algorithm="standard"), IMAGES, LABELS) == 1


def test_batch_mode_costs_what_its_masks_save() -> None:
    # DROP costs (1 - r) * 3, FREEZE 1 + 2 r, plain 3 each; linear rates 0 ... 0.5, so r is 0.25 on average. A branch of
    # rate 0 is never frozen: both its steps cost 3.
    rates = torch.linspace(0, 0.5, 11)
    steps = torch.where(rates == 0, 6.0, 4 - rates)
    cost = relative_flops(Chain(11), Config(algorithm="rdp", mode="batch", rate=0.5), IMAGES, LABELS)
    assert cost == pytest.approx(float(steps.mean() / 6), abs=0.05)
    assert cost < 0.75


def test_a_dense_branch_saves_only_where_all_rows_of_the_real_batch_have_one_mask() -> None:
    # BatchNorm keeps the branch dense. Its backward is then left out only in a FREEZE step of which no row was dropped:
    # often of 2 rows, hardly ever of 128.
    model = nn.Sequential(*[Normalized() for _ in range(4)])
    config = Config(algorithm="rdp", mode="row", rate=0.1)
    few, many = (relative_flops(model, config, torch.randn(n, 16), torch.zeros(n).long()) for n in (2, 128))
    assert few < 0.85
    assert 0.93 < many <= 1


def test_the_model_is_not_touched() -> None:
    model = Chain(3)
    before = copy.deepcopy(model.state_dict())
    relative_flops(model, Config(algorithm="rdp", rate=0.5), IMAGES, LABELS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_equal_cost_buys_the_epochs_that_cheap_steps_save() -> None:
    assert matched_epochs(Config(epochs=300), 0.65) == 300
    assert matched_epochs(Config(epochs=300, match="cost"), 0.65) == 462
    assert matched_epochs(Config(epochs=6, match="cost"), 20.0) == 1
