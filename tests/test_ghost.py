"""`compute="ghost"`: batch normalisation takes its statistics over the rows that run together, undropped or dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from laws.training import after_forward
from torch import Tensor, nn
from torch.nn import functional

import rdp


class NormedConv(nn.Module):
    """A branch with batch normalisation in the middle and at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(functional.relu(self.norm(self.conv(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def net(depth: int) -> nn.Sequential:
    return nn.Sequential(*(NormedConv() for _ in range(depth)))


def oracle(model: nn.Sequential, x: Tensor, masks: Tensor, phase: rdp.Phase) -> Tensor:
    """Each group of rows goes through the branch by itself; only the undropped leave a mark in running statistics."""
    for block, keep in zip(model, masks, strict=True):
        if phase is rdp.Phase.DROP and not keep.any() and len(keep) > 2:
            f = torch.zeros_like(x)
        elif keep.sum() < 2 or (~keep).sum() < 2:  # of a single row there may be no statistics
            f = block.branch(x)
            m = keep.view(-1, 1, 1, 1).to(f.dtype)
            f = m * f if phase is rdp.Phase.DROP else m * f.detach() + (1 - m) * f
        else:
            f = torch.zeros_like(x)
            kept = block.branch(x[keep])
            f[keep] = kept if phase is rdp.Phase.DROP else kept.detach()
            if phase is rdp.Phase.FREEZE:
                f[~keep] = _aside(block, x[~keep])
        x = x + f
    return x


def _aside(block: NormedConv, x: Tensor) -> Tensor:
    buffers = [(norm, dict(norm._buffers)) for norm in (block.norm, block.norm2)]
    for norm, original in buffers:
        norm._buffers.update({name: buffer.clone() for name, buffer in original.items()})
    f = block.branch(x)
    for norm, original in buffers:
        norm._buffers.update(original)
    return f


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_those_of_the_rows_that_run_together(rows, seed, mode):
    torch.manual_seed(seed)
    model = net(3).double()
    reference = copy.deepcopy(model)
    x = torch.randn(rows, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    handle = rdp.attach(model, 0.4, mode=mode, decay="constant", compute="ghost", example_inputs=x, seed=seed)
    for _ in range(4):
        output = model(x)
        expected = oracle(reference, x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            zero = torch.zeros_like(p)
            torch.testing.assert_close(zero if p.grad is None else p.grad, zero if q.grad is None else q.grad, msg=name)
        for buffer, wanted in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(buffer, wanted)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(("compute", "expected"), [("auto", "dense"), ("rows", "dense"), ("ghost", "rows")])
def test_no_other_way_to_compute_runs_batch_normalisation_on_some_rows(compute, expected, mode):
    handle = rdp.attach(net(1), 0.4, mode=mode, compute=compute, example_inputs=torch.randn(4, 3, 4, 4))
    assert handle.branches[0].compute == expected


def test_dropped_branches_are_skipped_in_batch_mode_and_their_statistics_do_not_move():
    """Also not for the backward of an earlier micro-batch, whose statistics have been put back since."""
    x, seen = torch.randn(8, 3, 4, 4), set()
    for seed in range(16):
        torch.manual_seed(0)
        model, rows = net(1), []
        after_forward(model[0].conv, lambda _, output, rows=rows: rows.append(len(output)))
        handle = rdp.attach(
            model, 0.5, mode="batch", decay="constant", compute="ghost", example_inputs=x.clone(), seed=seed
        )
        rows.clear()
        losses, kept = [], []
        for _ in range(2):
            before = [buffer.clone() for buffer in model.buffers()]
            losses.append(model(x).sum())
            kept.append(bool(handle.masks[0, 0]))
            still = all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
            assert still is not kept[-1]
        assert rows == [8 if keep else 2 for keep in kept]
        sum(reversed(losses)).backward()
        seen.add(tuple(kept))
    assert (True, False) in seen
