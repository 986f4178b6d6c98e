"""What takes the place of `torch.distributed`, so that one process can be several ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


class Wire:
    """What was sent is combined when the first of the ranks waits."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.destroyed: list[Any] = []
        self.sent: list[Tensor] = []
        self.others: list[int] = []
        """What other ranks call `highest` with."""

    def new_group(self, ranks: list[int], timeout: Any, backend: str, use_local_synchronization: bool) -> str:
        self.groups.append(
            {"ranks": ranks, "timeout": timeout, "backend": backend, "by members": use_local_synchronization}
        )
        return f"group {len(self.groups)}"

    def destroy_process_group(self, group: Any) -> None:
        self.destroyed.append(group)

    def all_reduce(self, tensor: Tensor, op: Any, group: Any, async_op: bool = False) -> Wire | None:
        assert group in [f"group {number + 1}" for number in range(len(self.groups))]
        assert tensor.device.type == "cpu"
        if op == dist.ReduceOp.MAX:
            assert not async_op
            tensor.fill_(max([*self.others, int(tensor)]))
            return None
        assert op == dist.ReduceOp.BOR
        assert async_op
        assert tensor.dtype == torch.uint8
        self.sent.append(tensor)
        return self

    def wait(self) -> None:
        assert len({len(sent) for sent in self.sent}) <= 1, "ranks sent different numbers of bytes"
        for sent in self.sent:
            sent.copy_(functools.reduce(torch.bitwise_or, self.sent))


@pytest.fixture
def world() -> Iterator[None]:
    """This process as rank 2 of 4, whose collectives reach nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.fixture
def wire(world: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Between rank 2 of 4 and the others."""
    wire = Wire()
    with monkeypatch.context() as patch:
        for name in ("new_group", "destroy_process_group", "all_reduce"):
            patch.setattr(dist, name, getattr(wire, name))
        yield wire


def lives(*flags: int) -> Tensor:
    """Which branches are live."""
    return torch.tensor(flags, dtype=torch.bool)
