"""A training step on an accelerator: the host waits for nothing, devices do not mix, and the numbers are the CPU's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from device.programs import MODELS, ROWS, Run, inputs_of
from device.simulated import install

DEVICE = install()
COMPUTE = ("auto", "dense", "rows", "ghost")
CASES = [
    (name, mode, compute, sampling, (i + k) % 2 == 0)
    for i, name in enumerate(MODELS)
    for k, compute in enumerate(COMPUTE)
    for mode, sampling in (("row", ("fixed", "bernoulli")[(i + k) % 2]), ("batch", "bernoulli"))
    if mode == "row" or k // 2 == i % 2
]
"""All models with all of `compute` in row mode, and half of them in batch mode; there are both ways of
sampling, and with gradients accumulated for AdamW or not, on some of the models."""


@functools.cache
def _plain_waits(name: str) -> list[str]:
    return Run(name, DEVICE, [inputs_of(name)], False, None).step().waits


def _train(name: str, accumulate: bool, **options: Any) -> None:
    """Train on the device and on the CPU, and compare."""
    batches = [inputs_of(name), inputs_of(name, ROWS - 3, seed=1)][: 1 + accumulate]
    ours, reference = (Run(name, device, batches, accumulate, options) for device in (DEVICE, "cpu"))
    assert [branch.compute for branch in ours.handle.branches] == [b.compute for b in reference.handle.branches]
    for _ in range(2):  # DROP and FREEZE
        cost = ours.step()
        reference.step()
        assert torch.equal(ours.handle.masks, reference.handle.masks)
        # In the first four steps that freeze, it is looked at what an optimizer does to the frozen.
        looked = [wait for wait in cost.update.waits if "from rdp: keeping.py" in wait]
        assert [wait for wait in cost.waits if wait not in looked] == _plain_waits(name) * len(batches)
        copies = [*cost.gradients.copies, *cost.update.copies]
        assert all("to simulated, pinned, non-blocking" in copy for copy in copies if "from rdp" in copy)
        # Masks, these for compiled parts, orders of rows, and what is cut of tensors that several branches share.
        most = 3 + sum(len(branch.cuts) for branch in ours.handle.branches)
        assert len([copy for copy in copies if "from rdp" in copy]) <= most * len(batches)
    found, wanted = ours.numbers(), reference.numbers()
    for parameter, x in wanted.items():
        torch.testing.assert_close(found[parameter], x, rtol=1e-4, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize(("name", "mode", "compute", "sampling", "accumulate"), CASES)
def test_steps(name: str, mode: str, compute: str, sampling: str, accumulate: bool) -> None:
    _train(name, accumulate, mode=mode, compute=compute, sampling=sampling, rate=0.3)


@pytest.mark.parametrize("name", MODELS)
def test_the_branches_are_proved_there(name: str) -> None:
    run = Run(name, DEVICE, [inputs_of(name)], False, {"rate": 0.3})
    assert "proved on two rows of the input" in str(run.handle.check(run.batches[0]))


def test_frozen_parameters_are_not_looked_at_for_ever() -> None:
    run = Run("vit", DEVICE, [inputs_of("vit")], True, {"rate": 0.5, "mode": "batch"})
    waits = [len(run.step().waits) for _ in range(12)]
    assert any(waits[:6])
    assert not any(waits[8:])
