"""Ranks that are not in step, or were not attached alike: an error on all of them, which says what differs."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from laws.training import identical
from torch.nn.parallel import DistributedDataParallel

import rdp
from distributed import ranks
from distributed.models import OPTIMIZERS
from distributed.training import Run, outcome, train_step

pytestmark = pytest.mark.distributed

RUN = Run(rows=((4,), (2,)), rate=0.8)


def start(**arguments: Any) -> tuple[Any, rdp.ResidualDropPath, Any, Any]:
    """A model, its handle, the wrapped model and the optimizer."""
    model = RUN.build()
    handle = rdp.attach(model, **{"rate": RUN.rate} | arguments)
    wrapped = DistributedDataParallel(model)
    return model, handle, wrapped, handle.wrap(OPTIMIZERS["sgd"](wrapped.parameters()))


def refused_step(arguments: dict[str, Any], advances: int) -> tuple[str, bool]:
    """Rank 1 differs from rank 0; the message of the step's error, and whether the model is as it was before."""
    model, handle, wrapped, optimizer = start(**arguments if dist.get_rank() == 1 else {})
    if advances:
        train_step(RUN, 0, wrapped, model, optimizer)
    for _ in range(advances if dist.get_rank() == 1 else 0):
        handle.advance()
    before = outcome(model, optimizer)
    with pytest.raises(rdp.RankError) as error:
        train_step(RUN, 1, wrapped, model, optimizer)
    return str(error.value), identical(before, outcome(model, optimizer))


@pytest.mark.parametrize(
    ("arguments", "advances", "named"),
    [
        ({}, 1, "the step"),
        ({}, 2, "the step"),  # again in the same phase, but with the masks of another step
        ({"seed": 1}, 0, "the seed"),
        ({"rate": 0.7}, 0, "the rates"),
        ({"decay": "constant"}, 0, "the rates"),
        ({"rate_schedule": rdp.rate_schedules.warmup(100)}, 0, "the rates"),
        ({"mode": "batch"}, 0, "mode"),
        ({"sampling": "fixed"}, 0, "sampling"),
        ({"phases": (rdp.Phase.DROP,)}, 0, "phases"),
        ({"branches": ["body.1.fc2"]}, 0, "the branches"),
        ({"seed": 1, "decay": "constant"}, 0, "the rates, the seed"),
    ],
)
def test_ranks_that_differ(arguments, advances, named):
    for message, untouched in ranks.run(refused_step, 2, arguments, advances):
        assert named in message
        assert untouched


def missing_step(how: str) -> str | None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model, _, wrapped, optimizer = start(process_group=group)
    train_step(RUN, 0, wrapped, model, optimizer)
    message = None
    if dist.get_rank() == 0:
        with pytest.raises(rdp.RankError) as error:
            optimizer.step()
        message = str(error.value)
    if how == "goes on":
        dist.barrier()
    return message


@pytest.mark.parametrize("how", ["ends", "goes on"])
def test_a_rank_that_does_not_step(how):
    message, _ = ranks.run(missing_step, 2, how)
    assert re.search("did not step with this one.*Join", message)


def alone(distributed: bool) -> dict[str, Any]:
    """Train this rank's own model on this rank's own rows."""
    rank = dist.get_rank()
    group = dist.new_group([rank], use_local_synchronization=True) if distributed else None
    if not distributed:
        dist.barrier()  # the other may not have met this one yet
        dist.destroy_process_group()
    torch.manual_seed(rank)
    model = RUN.build()
    handle = rdp.attach(model, 0.8, process_group=group)
    optimizer = handle.wrap(OPTIMIZERS["sgd"](model.parameters()))
    for step in range(10 + rank):
        model(model.rows(1, seed=step + 100 * rank)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if not distributed:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return outcome(model, optimizer, handle)


def test_ranks_that_train_models_of_their_own():
    """In a process group of each one alone they are not held up by each other, and draw the masks of a lone process."""
    together, lone = ranks.run(alone, 2, True), ranks.run(alone, 2, False)
    assert identical(together, lone)
    assert [result["step_count"] for result in together] == [10, 11]
