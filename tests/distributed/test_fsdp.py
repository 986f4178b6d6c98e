"""FSDP2: a model whose parameters are sharded trains as one that is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from laws.training import Spy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

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


def train_by_fsdp1(run: Run, original: bool) -> dict[str, Any]:
    """Train under FullyShardedDataParallel; returns how many frozen parameters moved, or what was refused."""
    model = run.build()
    handle = rdp.attach(model, 0.5, decay="constant", mode="batch", example_inputs=model.rows(2, 0))
    if run.attach == "after":
        handle.remove()
    sharded = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    try:
        if run.attach == "after":
            handle = rdp.attach(sharded, 0.5, decay="constant", mode="batch")
        optimizer = handle.wrap(OPTIMIZERS["sgd"](sharded.parameters()))
    except rdp.AttachError as error:
        return {"refused": str(error)}
    frozen = moved = 0
    for step in range(8):
        optimizer.zero_grad()
        sharded(model.rows(2, step)).square().sum().backward()
        names = {name.replace("_fsdp_wrapped_module.", "") for name in handle.frozen}
        with FullyShardedDataParallel.summon_full_params(sharded):
            before = {name: p.detach().clone() for name, p in handle.model.named_parameters()}
        optimizer.step()
        with FullyShardedDataParallel.summon_full_params(sharded):
            after = dict(handle.model.named_parameters())
            moved += sum(not torch.equal(after[name], before[name]) for name in names)
        frozen += len(names)
    return {"frozen": frozen, "moved": moved, "ok": handle.check().ok}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("model", ["transformer", "mlp", "resnet"])
def test_fsdp1_needs_the_original_parameters(model, attach):
    run = Run(model=model, rows=ROWS["even"], attach=attach)
    (refused,) = ranks.run(train_by_fsdp1, 1, run, False)
    assert "Pass use_orig_params=True, or use fully_shard" in refused["refused"]
    (trained,) = ranks.run(train_by_fsdp1, 1, run, True)
    assert trained["frozen"] > 0
    assert (trained["moved"], trained["ok"]) == (0, True)
