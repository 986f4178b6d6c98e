"""DTensor tensor parallelism: all ranks work on the same rows, so they must mask them alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from laws.architectures import Architecture
from laws.training import Spy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rdp
from distributed import ranks
from distributed.alone import assert_as_alone, assert_replicas
from distributed.models import OPTIMIZERS
from distributed.training import Run, batch, full, loss, outcome

pytestmark = pytest.mark.distributed

RUN = Run(rows=((3,),), rate=0.8)


def split(model: Architecture, mesh: DeviceMesh) -> None:
    """Divide the weights of every block between the ranks."""
    for block in model.body:
        parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


def train(run: Run, when: str) -> dict[str, Any]:
    """Train on rows that are the same on all ranks.

    Args:
        run: The run.
        when: Attach "before" or "after" the model is split; "early", its branches are also found before.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = run.build()
    if when == "after":
        split(model, mesh)
    inputs = model.rows(2, 0) if when == "early" else None
    handle = rdp.attach(model, run.rate, mode=run.mode, process_group=group, example_inputs=inputs)
    if when != "after":
        split(model, mesh)
    return train_on(model, handle, run, 0)


def train_on(model: Architecture, handle: rdp.ResidualDropPath, run: Run, rank: int) -> dict[str, Any]:
    """Train on the rows of `rank`."""
    inner = OPTIMIZERS[run.optimizer](model.parameters(), foreach=False)
    optimizer, spy, frozen = handle.wrap(inner), Spy(inner, model), []
    for step in range(run.steps):
        loss(model(batch(model, run.rows[rank][0], step, 0, rank))).backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen.append({name for name, gradient in spy.gradients.items() if gradient is None})
    return full(outcome(model, inner, handle)) | {"frozen": frozen}


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_equals_one_process(when, optimizer, mode):
    run = Run(rows=((3,),), rate=0.8, optimizer=optimizer, mode=mode)
    assert_as_alone(assert_replicas(ranks.run(train, 2, run, when)), run)


def test_branches_found_before_splitting_in_batch_mode():
    run = Run(rows=((3,),), rate=0.8, mode="batch")
    assert_as_alone(assert_replicas(ranks.run(train, 2, run, "early")), run)


def split_too_late() -> str:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = RUN.build()
    handle = rdp.attach(model, RUN.rate, process_group=group, example_inputs=model.rows(2, 0))
    split(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        for step in range(4):
            loss(model(batch(model, 3, step, 0, 0))).backward()
            handle.advance()
    except rdp.ForwardError as error:
        return str(error)
    raise AssertionError("not refused")


def test_branches_found_before_splitting_are_refused_in_row_mode():
    """Their gates would see what the module returns before it is made local again."""
    for message in ranks.run(split_too_late, 2):
        assert "is a DTensor" in message
        assert "use_local_output" in message


def train_in_two_dimensions(run: Run) -> dict[str, Any]:
    """Train on four ranks: two pairs with rows of their own, and the weights divided within each pair and by FSDP."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = run.build()
    split(model, mesh["tp"])
    for block in model.body:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    handle = rdp.attach(model, run.rate, mode=run.mode, process_group=mesh["dp"].get_group())
    return train_on(model, handle, run, mesh["dp"].get_local_rank())


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_together_with_fsdp(mode):
    run = Run(rows=((5,), (1,)), rate=0.8, mode=mode)
    assert_as_alone(assert_replicas(ranks.run(train_in_two_dimensions, 4, run)), run)


def refused(early: bool) -> str:
    model = RUN.build()
    split(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    x = model.rows(2, 0)
    try:
        rdp.attach(model, RUN.rate, example_inputs=x if early else None)
        assert not early, "not refused"
        model(x)
    except rdp.RankError as error:
        return str(error)
    raise AssertionError("not refused")


@pytest.mark.parametrize("early", [False, True])
def test_is_refused_without_a_process_group(early):
    for message in ranks.run(refused, 2, early):
        assert "tensor parallelism" in message
        assert "process_group=" in message
