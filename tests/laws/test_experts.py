"""Experts that got none of the rows that branches were found with are frozen with the branch that they are in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import rdp

WIDTH, EXPERTS = 8, 6


class Experts(nn.Module):
    """Each row goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(1).max(1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                y[rows] = expert(x[rows]) * share[rows, None]
        return y


class ExpertsAndLoss(Experts):
    """What balances the load is a loss of the router's, which no gate guards."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.router(x).softmax(1).mean(0).square().sum()


class Block(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.mixture = experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mixture(x)
        y, loss = y if isinstance(y, tuple) else (y, x.new_zeros(()))
        return x + y, loss


class Mixture(nn.Module):
    def __init__(self, kind: type[Experts]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(Block(kind()) for _ in range(3))
        self.spare = nn.Linear(WIDTH, WIDTH)
        """Nothing uses it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.stem(x), x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            total = total + loss
        return self.head(x), total

    def of_experts(self, block: int) -> Iterator[str]:
        """The names of their parameters."""
        return (
            f"blocks.{block}.mixture.experts.{n}.{i}.{p}"
            for n in range(EXPERTS)
            for i in (0, 2)
            for p in ("weight", "bias")
        )


@pytest.mark.parametrize("kind", [Experts, ExpertsAndLoss])
def test_all_of_them_are_the_branchs_whoever_got_a_row(kind):
    torch.manual_seed(0)
    model = Mixture(kind)
    with rdp.attach(model, 0.5, example_inputs=torch.randn(2, 3)) as handle:
        for number, branch in enumerate(handle.branches):
            router = {f"blocks.{number}.mixture.router.{p}" for p in ("weight", "bias")} if kind is Experts else set()
            assert set(branch.parameters) == {*model.of_experts(number)} | router


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("kind", [Experts, ExpertsAndLoss])
@pytest.mark.filterwarnings("error::rdp.RdpWarning")
def test_what_no_row_learns_through_does_not_move(kind, mode):
    """By momentum and weight decay it would, and with gradients of zeros also where an expert gets no row."""
    torch.manual_seed(0)
    model = Mixture(kind)
    handle = rdp.attach(model, 0.5, decay="constant", mode=mode, seed=1, example_inputs=torch.randn(2, 3))
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1))
    still = moved = 0
    for step in range(24):
        optimizer.zero_grad(set_to_none=False)
        output, total = model(torch.randn(16 if mode == "batch" or step < 4 else 1, 3))
        (output.square().mean() + total).backward()
        learning = ~handle.masks if handle.phase is rdp.Phase.FREEZE else handle.masks
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        after = dict(model.named_parameters())
        for number, rows in enumerate(learning):
            same = [torch.equal(before[name], after[name]) for name in model.of_experts(number)]
            if rows.any():
                moved += not all(same)
            else:
                assert all(same)
                still += 1
    assert still > 10
    assert moved > 10
    assert handle.check().ok, str(handle.check())
