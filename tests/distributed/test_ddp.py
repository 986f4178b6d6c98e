"""DistributedDataParallel: replicas stay bit-identical, and equal one process that has all ranks' rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from laws.training import Spy
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.multiprocessing import ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

import rdp
from distributed import ranks
from distributed.alone import assert_as_alone, assert_replicas, assert_same, ranks_differ, train_alone
from distributed.models import OPTIMIZERS
from distributed.training import Run, batch, loss, outcome, train, train_step

pytestmark = pytest.mark.distributed

ROWS = {
    "even": ((4,), (4,)),
    "uneven": ((5,), (1,)),
    "three": ((2,), (1,), (3,)),
    "accumulated": ((2, 1), (1, 3)),
    "split": ((6,), (2, 3)),
}
"""For each rank the rows of each micro-batch."""

MODES = pytest.mark.parametrize("mode", ["row", "batch"])


def trained(run: Run) -> dict[str, Any]:
    """Train on all ranks; what each of them ended with."""
    assert ranks_differ(run) or run.mode == "batch", "the run is too easy"
    result = assert_replicas(ranks.run(train, run.ranks, run))
    assert (result["phase"], result["step_count"]) == ("DROP", run.steps)
    assert any(result["frozen"]), "the run is too easy"
    return result


@MODES
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rows", ROWS)
def test_equals_one_process_with_the_rows_of_all(rows, optimizer, mode):
    run = Run(rows=ROWS[rows], optimizer=optimizer, mode=mode, rate=0.8, steps=50)
    assert_as_alone(trained(run), run)


@MODES
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
@pytest.mark.parametrize(
    "wrapper", ["static_graph", "gradient_as_bucket_view", "find_unused_parameters", "many_buckets"]
)
def test_arguments_of_the_wrapper(wrapper, rows, mode):
    run = Run(rows=ROWS[rows], wrapper=wrapper, mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
@pytest.mark.parametrize("wrapper", ["fp16_compress", "bf16_compress", "power_sgd"])
def test_gradient_compression(wrapper, mode):
    run = Run(rows=ROWS["uneven"], wrapper=wrapper, mode=mode, rate=0.8)
    result = trained(run)
    if wrapper != "power_sgd":  # which feeds back what it has not sent, also of gradients that were hidden
        assert_as_alone(result, run, rtol=0.1, atol=0.03)


@MODES
@pytest.mark.parametrize("attach", ["inner", "wrapper"])
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
def test_attached_after_wrapping(rows, attach, mode):
    run = Run(rows=ROWS[rows], attach=attach, mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
def test_a_reduction_after_every_micro_batch(rows, mode):
    run = Run(rows=ROWS[rows], accumulate="sync", mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
@pytest.mark.parametrize("checkpointed", [False, True])
def test_transformer(checkpointed, mode):
    run = Run(model="transformer", rows=ROWS["uneven"], checkpointed=checkpointed, mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
def test_checkpointed_micro_batches(mode):
    run = Run(rows=ROWS["accumulated"], checkpointed=True, mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
def test_clipped_gradients(mode):
    run = Run(rows=ROWS["uneven"], clip=0.1, mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
def test_autocast(rows, mode):
    run = Run(rows=ROWS[rows], autocast=True, mode=mode, rate=0.8, dtype=torch.float32)
    assert_as_alone(trained(run), run, rtol=0.1, atol=0.03)


@MODES
def test_validation_on_one_rank(mode):
    run = Run(rows=ROWS["accumulated"], validate=True, mode=mode, rate=0.8)
    assert_as_alone(trained(run), run)


def test_a_fixed_number_of_rows():
    run = Run(rows=((2,), (1,)), sampling="fixed", rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
def test_rates_that_change(mode):
    """Plain at first, then more and more is dropped, and in the end nothing."""
    run = Run(
        rows=ROWS["uneven"],
        mode=mode,
        rate=0.9,
        rate_schedule=rdp.rate_schedules.linear(3, 9) * rdp.rate_schedules.early(17),
    )
    assert not any(run.rates(2))
    assert any(run.rates(4))
    assert_as_alone(trained(run), run)


def test_frozen_parameters():
    """Figure 5 read literally: gradients flow through frozen branches."""
    run = Run(rows=ROWS["uneven"], freeze="params", mode="batch", rate=0.8)
    assert_as_alone(trained(run), run)


@MODES
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
@pytest.mark.parametrize("wrapper", ["default", "static_graph"])
def test_batch_norm(wrapper, rows, mode):
    """Its statistics are each rank's own, so the replicas are all that can be compared."""
    trained(Run(model="resnet", rows=ROWS[rows], wrapper=wrapper, mode=mode, rate=0.9))


@MODES
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
def test_batch_norm_over_all_ranks(rows, mode):
    """Its collectives, forwards and backwards, need every rank to run every branch."""
    run = Run(model="shared_resnet", rows=ROWS[rows], mode=mode, rate=0.9)
    assert_as_alone(trained(run), run)


def sync_batch_norm() -> None:
    nn.SyncBatchNorm(2)(torch.randn(2, 2, 3))


def test_torch_refuses_sync_batch_norm_on_cpus():
    """Once it does not, `SharedBatchNorm` can go."""
    with pytest.raises(ProcessRaisedException, match="SyncBatchNorm expected input tensor to be on GPU"):
        ranks.run(sync_batch_norm, 2)


def overflowing(run: Run) -> dict[str, Any]:
    """Train as `train` does, but try every third step before with gradients that overflow on one rank."""
    model, rank = run.build(), dist.get_rank()
    handle = run.attached(model)
    wrapped = DistributedDataParallel(model)
    inner = OPTIMIZERS[run.optimizer](wrapped.parameters())
    optimizer, spy, frozen = handle.wrap(inner), Spy(inner, model), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for step in range(run.steps):
        for overflow in [True, False] if step % 3 == 0 else [False]:
            for k, count in enumerate(run.rows[rank]):
                factor = float("inf") if overflow and rank == 1 else 1.0
                scaler.scale(loss(wrapped(batch(model, count, step, k, rank))) * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        frozen.append({name for name, gradient in spy.gradients.items() if gradient is None})
    assert scaler.get_scale() == 2.0 ** (20 - len(range(0, run.steps, 3))), "the run is too easy"
    return outcome(model, inner, handle) | {"frozen": frozen}


@MODES
@pytest.mark.parametrize("rows", ["uneven", "accumulated"])
def test_steps_skipped_for_an_overflow_on_one_rank(rows, mode):
    run = Run(rows=ROWS[rows], mode=mode, rate=0.8, clip=0.1)
    assert_as_alone(assert_replicas(ranks.run(overflowing, run.ranks, run)), run)


def unwrapped(run: Run) -> dict[str, Any]:
    """Train with an optimizer that is not wrapped."""
    model, rank = run.build(), dist.get_rank()
    handle = run.attached(model)
    wrapped = DistributedDataParallel(model)
    optimizer = OPTIMIZERS[run.optimizer](wrapped.parameters())
    for step in range(run.steps):
        loss(wrapped(batch(model, run.rows[rank][0], step, 0, rank))).backward()
        optimizer.step()
        handle.advance()
        optimizer.zero_grad()
    return outcome(model, optimizer, handle)


@MODES
def test_without_wrapping_the_optimizer(mode):
    """Gradients of zero then move parameters by momentum, on all ranks alike."""
    run = Run(rows=ROWS["uneven"], mode=mode, rate=0.8)
    assert_replicas(ranks.run(unwrapped, run.ranks, run))


def zero_redundancy(run: Run) -> dict[str, Any]:
    """Train with optimizer state that is divided between the ranks."""
    model = run.build()
    handle = run.attached(model)
    wrapped = DistributedDataParallel(model)
    kind = OPTIMIZERS[run.optimizer]
    inner = ZeroRedundancyOptimizer(wrapped.parameters(), kind.func, **kind.keywords)
    optimizer, spy, frozen = handle.wrap(inner), Spy(inner, model), []
    for step in range(run.steps):
        train_step(run, step, wrapped, model, optimizer)
        frozen.append({name for name, gradient in spy.gradients.items() if gradient is None})
    return {"parameters": {name: p.detach() for name, p in model.named_parameters()}, "frozen": frozen}


@MODES
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zero_redundancy_optimizer(optimizer, mode):
    run = Run(rows=ROWS["uneven"], mode=mode, rate=0.8, optimizer=optimizer)
    result = assert_replicas(ranks.run(zero_redundancy, run.ranks, run))
    alone = train_alone(run)
    alone["parameters"] = {name: parameter for name, (parameter, _) in alone["parameters"].items()}
    assert_same(result, alone)
