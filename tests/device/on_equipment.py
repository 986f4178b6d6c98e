"""The simulated device itself: it finds what it is there to find, wherever somebody plants it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from device.programs import Run, inputs_of
from device.simulated import install, recording
from rdp.training import gates, step

DEVICE = install()
WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to without blocking": lambda x: x.to("cpu", non_blocking=True),
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 0],
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "repeats": lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64, device=x.device), 0),
    "blocking copy": lambda x: torch.ones(3).to(x.device),
    "blocking copy of pinned memory": lambda x: torch.ones(3).pin_memory().to(x.device),
    "copy of memory that is not pinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "copy into": lambda x: torch.ones(3, device=x.device).copy_(torch.ones(3)),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: x * 2 + x.sum(),
    "gather": lambda x: x.index_select(0, torch.arange(2, device=x.device)),
    "view": lambda x: x.flatten()[1:],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "number of a shape": lambda x: x.shape[0],
    "copy": lambda x: torch.ones(3).pin_memory()[:2].to(x.device, non_blocking=True),
    "repeats of a number": lambda x: x.repeat_interleave(2, 0),
}


@pytest.mark.parametrize("what", WAITS)
def test_the_host_waits(what: str) -> None:
    x = torch.ones(4, 3).to(DEVICE)
    with recording() as record:
        WAITS[what](x)
    assert len(record.waits) == 1


@pytest.mark.parametrize("what", FREE)
def test_the_host_does_not_wait(what: str) -> None:
    x = torch.ones(4, 3).to(DEVICE)
    with recording() as record:
        FREE[what](x)
    assert record.waits == []


def test_devices_do_not_mix() -> None:
    x = torch.ones(4, 3).to(DEVICE)
    with pytest.raises(RuntimeError, match="tensors on simulated and on cpu"):
        x + torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="tensors on simulated and on cpu"):
        torch.where(torch.ones(4, 1, dtype=torch.bool), x, 0.0)
    assert ((x + torch.tensor(1.0)).raw == 2).all()  # numbers do


def test_numbers_do_not_become_a_tensor_of_the_device() -> None:
    with pytest.raises(RuntimeError):
        torch.tensor([1.0, 2.0], device=DEVICE)


def test_launches_are_kernels() -> None:
    x = torch.ones(4, 3).to(DEVICE)
    with recording() as record:
        x.t().reshape(2, 6).view(-1).add_(1)
        torch.empty(3, device=DEVICE)
    assert record.launches == {"clone": 1, "add_": 1}


def test_results_and_gradients_are_those_of_the_cpu() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = x.detach().to(DEVICE).requires_grad_()
    for z in (x, y):
        (z.softmax(1)[:, 1:] * z.exp()[:, :2]).sum().backward()
    assert torch.equal(x.grad, y.grad.raw)
    y.detach()[1:].zero_()
    assert torch.equal(y.raw[1:], torch.zeros(3, 3))


def _planted(monkeypatch: pytest.MonkeyPatch, plant: Callable[[Tensor], object]) -> list[str]:
    """The waits of a DROP and a FREEZE step with something planted where gates are."""
    run = Run("vit", DEVICE, [inputs_of("vit")], False, {"rate": 0.25, "sampling": "fixed", "compute": "dense"})
    sound = gates.gate

    def gate(phase: object, keep: Tensor | bool, x: Tensor, *others: object) -> Tensor:
        plant(keep)
        return sound(phase, keep, x, *others)

    monkeypatch.setattr(gates, "gate", gate)
    return [*run.step().waits, *run.step().waits]


def test_what_waits_in_the_hot_path_is_found_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _planted(monkeypatch, lambda keep: None) == []
    for what in ("item", "bool", "tolist", "blocking copy"):
        waits = _planted(monkeypatch, WAITS[what])
        assert len(waits) >= 8, what  # two blocks, two branches each, two steps
        assert all("from rdp: gate_hooks.py" in wait for wait in waits)


def test_a_mask_on_the_wrong_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "sent", lambda tensor, device: tensor)
    run = Run("vit", DEVICE, [inputs_of("vit")], False, {"rate": 0.25, "sampling": "fixed", "compute": "dense"})
    with pytest.raises(RuntimeError, match="tensors on simulated and on cpu"):
        run.step()


def test_a_copy_that_blocks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "sent", lambda tensor, device: tensor.to(device))
    run = Run("vit", DEVICE, [inputs_of("vit")], False, {"rate": 0.25, "sampling": "fixed"})
    waits = run.step().waits
    assert len(waits) == 1
    assert "not pinned, blocking, from rdp: step.py" in waits[0]
