"""Ranks that run out of data earlier than others, under `torch.distributed.algorithms.join.Join`."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from laws.training import Spy
from torch.distributed.algorithms.join import Join

import rdp
from distributed import ranks
from distributed.alone import assert_replicas, assert_same, train_alone
from distributed.models import OPTIMIZERS, WRAPPERS
from distributed.training import Run, batch, outcome, train_step

pytestmark = pytest.mark.distributed

EPOCHS = ((5, 8), (7, 4), (3, 3))
"""The number of steps of each rank in each epoch; the last is not under Join, as the ranks have as many."""


def train(run: Run, epochs: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    model, rank = run.build(), dist.get_rank()
    handle = run.attached(model) if run.attach == "before" else None
    wrapped = WRAPPERS[run.wrapper](model)
    if handle is None:
        handle = run.attached(wrapped)
    inner = OPTIMIZERS[run.optimizer](wrapped.parameters())
    optimizer, spy, frozen, first = handle.wrap(inner), Spy(inner, model), {}, 0
    for steps in epochs:
        with Join([wrapped, handle], enable=len(set(steps)) > 1):
            for step in range(first, first + steps[rank]):
                train_step(run, step, wrapped, model, optimizer)
                frozen[step] = {name for name, gradient in spy.gradients.items() if gradient is None}
        first += max(steps)
    return outcome(model, inner, handle) | {"frozen": frozen}


def present(epochs: tuple[tuple[int, int], ...], step: int) -> list[int]:
    """The ranks that have data in a step."""
    for steps in epochs:
        if step < max(steps):
            return [rank for rank, count in enumerate(steps) if step < count]
        step -= max(steps)
    raise IndexError


def check(run: Run, epochs: tuple[tuple[int, int], ...] = EPOCHS) -> None:
    # Without optimizer state, of which a rank without data loses track under Join even without RDP.
    steps = sum(map(max, epochs))
    run = replace(run, steps=steps, optimizer="plain_sgd")
    results = ranks.run(train, run.ranks, run, epochs)
    frozen = [result.pop("frozen") for result in results]
    result = assert_replicas(results)
    assert (result["phase"], result["step_count"]) == (["DROP", "FREEZE"][steps % 2], steps)
    alone = train_alone(run, functools.partial(present, epochs))
    for rank, step in itertools.product(range(run.ranks), range(steps)):
        assert (step in frozen[rank]) == (rank in present(epochs, step))
        assert frozen[rank].get(step, alone["frozen"][step]) == alone["frozen"][step]
    assert_same(result | {"frozen": alone["frozen"]}, alone)


@pytest.mark.parametrize("attach", ["before", "wrapper"])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("rows", [((4,), (2,)), ((2, 1), (1, 3))], ids=["single", "accumulated"])
def test_uneven_numbers_of_batches(rows, mode, attach):
    check(Run(rows=rows, mode=mode, rate=0.8, attach=attach))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_rank_without_any_batch(mode):
    check(Run(rows=((4,), (2,)), mode=mode, rate=0.8), ((3, 0), (2, 2)))


def handle_first() -> str:
    run = Run(rows=((4,), (2,)), rate=0.8)
    model = run.build()
    handle = run.attached(model)
    wrapped = WRAPPERS[run.wrapper](model)
    with pytest.raises(rdp.RankError) as error, Join([handle, wrapped]):
        wrapped(batch(model, 2, 0, 0, 0))
    return str(error.value)


def test_the_model_must_be_listed_first():
    for message in ranks.run(handle_first, 2):
        assert "Join([ddp_model, handle])" in message
