"""FSDP2: a model whose parameters are sharded trains as one that is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from laws.training import Spy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rdp
from distributed import ranks
from distributed.alone import assert_as_alone, assert_replicas, ranks_differ
from distributed.models import OPTIMIZERS
from distributed.training import Run, checkpoint_blocks, full, outcome, train_step

pytestmark = pytest.mark.distributed

ROWS = {"even": ((4,), (4,)), "uneven": ((5,), (1,)), "three": ((2,), (1,), (3,)), "accumulated": ((2, 1), (1, 3))}


def train(run: Run, reshard: bool, found: str) -> dict[str, Any]:
    """Train a model that is sharded block by block, and the rest of it with the root.

    Args:
        run: The run; `attach` says whether before or after sharding.
        reshard: Whether blocks are sharded again between forward and backward.
        found: "early", when attaching, or "late", in the first forward.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = run.build()
    inputs = model.rows(2, 0) if found == "early" else None
    handle = rdp.attach(model, run.rate, mode=run.mode, example_inputs=inputs) if run.attach == "before" else None
    if run.checkpointed:
        checkpoint_blocks(model)
    for block in model.body:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    if handle is None:
        handle = rdp.attach(model, run.rate, mode=run.mode, example_inputs=inputs)
    inner = OPTIMIZERS[run.optimizer](model.parameters())
    optimizer, spy, frozen = handle.wrap(inner), Spy(inner, model), []
    for step in range(run.steps):
        train_step(run, step, model, model, optimizer)
        frozen.append({name for name, gradient in spy.gradients.items() if gradient is None})
    return full(outcome(model, inner, handle)) | {"frozen": frozen}


def assert_trains(run: Run, reshard: bool = True, found: str = "late") -> None:
    assert ranks_differ(run) or run.mode == "batch", "the run is too easy"
    assert_as_alone(assert_replicas(ranks.run(train, run.ranks, run, reshard, found)), run)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rows", ROWS)
def test_equals_one_process_with_the_rows_of_all(rows, optimizer, mode):
    assert_trains(Run(rows=ROWS[rows], mode=mode, rate=0.8, optimizer=optimizer, accumulate="sync"))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("found", ["early", "late"])
@pytest.mark.parametrize("attach", ["before", "after"])
def test_attached_before_and_after_sharding(attach, found, mode):
    assert_trains(Run(rows=ROWS["uneven"], mode=mode, rate=0.8, attach=attach), found=found)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_transformer(reshard, checkpointed, mode):
    run = Run(model="transformer", rows=ROWS["uneven"], mode=mode, rate=0.8, checkpointed=checkpointed, clip=0.1)
    assert_trains(run, reshard)
