"""What the simulated device shows, on a GPU if there is one: nothing waits for it, and the numbers are the CPU's."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from device.programs import MODELS, ROWS, build, inputs_of
from torch import nn

import rdp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

WAYS: dict[str, dict[str, Any]] = {
    "row": {},
    "row, fixed": {"sampling": "fixed"},
    "row, on rows": {"compute": "rows"},
    "row, fixed, on rows": {"compute": "rows", "sampling": "fixed"},
    "row, ghost": {"compute": "ghost"},
    "batch": {"mode": "batch"},
}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    """Gradients of all batches, and an update."""
    optimizer.zero_grad()
    for x in batches:
        output = model(x)
        first = output if isinstance(output, torch.Tensor) else output[0]
        first.square().mean().backward()
    optimizer.step()


def waits(run: functools.partial[None]) -> list[str]:
    """Where the host waits for the GPU meanwhile, but for the look at what an optimizer does to the frozen."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    seen = [each for each in told if "synchroniz" in str(each.message)]
    return [f"{each.filename}:{each.lineno}" for each in seen if not each.filename.endswith("keeping.py")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_steps(name: str, way: str) -> None:
    """In double precision, so that kernels of two devices agree."""
    model = build(name).double()
    batches = [inputs_of(name), inputs_of(name, ROWS - 3, seed=1)]
    batches = [x.double() if x.is_floating_point() else x for x in batches]
    twins, optimizers, handles = [], [], []
    for device in ("cuda", "cpu"):
        twin = copy.deepcopy(model).to(device)
        handle = rdp.attach(
            twin, 0.3, decay="constant", seed=3, example_inputs=batches[0].to(device), verify=False, **WAYS[way]
        )
        optimizers.append(handle.wrap(torch.optim.SGD(twin.parameters(), lr=1e-4, momentum=0.9)))
        twins.append(twin), handles.append(handle)
    on_gpu = [x.cuda() for x in batches]
    plain = copy.deepcopy(model).cuda()
    plainly = torch.optim.SGD(plain.parameters(), lr=1e-4, momentum=0.9)
    step(plain, plainly, on_gpu)
    own = waits(functools.partial(step, plain, plainly, on_gpu))
    for number in range(4):
        found = waits(functools.partial(step, twins[0], optimizers[0], on_gpu))
        step(twins[1], optimizers[1], batches)
        assert torch.equal(handles[0].masks.cpu(), handles[1].masks)
        if number > 1:  # what is made once may be waited for
            assert found == own
    for (parameter, ours), reference in zip(twins[0].state_dict().items(), twins[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-7, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_the_branches_are_proved_there(name: str) -> None:
    model, x = build(name).cuda(), inputs_of(name).cuda()
    handle = rdp.attach(model, 0.3, example_inputs=x)
    assert "proved on two rows of the input" in str(handle.check(x))
