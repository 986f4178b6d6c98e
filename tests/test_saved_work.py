"""What a step does not need is not computed: counted in operations, and in rows that modules are called with."""

from __future__ import annotations

import pytest
import torch
from laws.architectures import LoopMLP
from laws.training import after_forward
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rdp


class Net(nn.Module):
    """Blocks of nearly all of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(16)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_step_costs_what_its_rows_need(mode):
    """Of a step's 3 units DROP needs (1 - r) * 3 and FREEZE 1 + 2r; here r = 0.1."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 64, requires_grad=True)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    plain = flops()
    handle = rdp.attach(model, 0.1, mode=mode, decay="constant", example_inputs=x)
    ratios: dict[rdp.Phase, list[float]] = {rdp.Phase.DROP: [], rdp.Phase.FREEZE: []}
    for _ in range(40):
        ratios[handle.phase].append(flops() / plain)
        handle.advance()
    assert sum(ratios[rdp.Phase.DROP]) / 20 < 0.93
    assert sum(ratios[rdp.Phase.FREEZE]) / 20 < 0.45


@pytest.mark.parametrize("compute", ["auto", "dense"])
def test_a_branch_dropped_for_the_whole_batch_runs_on_a_single_row(compute):
    """Since a hook cannot keep the model from calling it."""
    torch.manual_seed(0)
    model, seen = LoopMLP(6).double(), []
    for layer in model.layers:
        after_forward(layer[0], lambda args, _: seen.append(len(args[0])))
    handle = rdp.attach(
        model, 0.5, mode="batch", decay="constant", compute=compute, example_inputs=model.rows(2, 0), seed=1
    )
    for step in range(6):
        seen.clear()
        model(model.rows(5, step)).sum().backward()
        drop = handle.phase is rdp.Phase.DROP
        assert not handle.masks.all()
        assert seen == [1 if drop and compute == "auto" and not keep else 5 for keep in handle.masks[:, 0]]
        for name in handle.frozen:  # nothing is computed backwards for them
            assert model.get_parameter(name).grad is None
        model.zero_grad()
        handle.advance()
