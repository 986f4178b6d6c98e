"""Saving and resuming on several ranks, in the middle of a cycle; on another number of ranks it is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from laws.training import identical
from torch.nn.parallel import DistributedDataParallel

import rdp
from distributed import ranks
from distributed.models import OPTIMIZERS
from distributed.training import Run, batch, loss, outcome, train_step

pytestmark = pytest.mark.distributed

RUN = Run(rows=((2, 1), (1, 3)), rate=0.8)


def start(run: Run, **arguments: Any) -> tuple[Any, rdp.ResidualDropPath, Any, Any]:
    """A model, its handle, the wrapped model and the optimizer."""
    model = run.build()
    handle = rdp.attach(model, run.rate, mode=run.mode, **arguments)
    wrapped = DistributedDataParallel(model)
    return model, handle, wrapped, handle.wrap(OPTIMIZERS["sgd"](wrapped.parameters()))


def resumed(run: Run, at: int, whose: str, sampling: str) -> bool:
    """Does a run that is saved after `at` steps and resumed by new objects end as one that is not?"""
    model, handle, wrapped, optimizer = start(run, sampling=sampling)
    for step in range(8):
        if step == at:
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), handle.state_dict()], saved)
        train_step(run, step, wrapped, model, optimizer)
    states = [saved.getvalue()]
    if whose == "rank 0's":
        dist.broadcast_object_list(states, src=0)

    again, handle_again, wrapped_again, optimizer_again = start(run, sampling=sampling)
    of_model, of_optimizer, of_handle = torch.load(io.BytesIO(states[0]), weights_only=True)
    again.load_state_dict(of_model)
    optimizer_again.load_state_dict(of_optimizer)
    handle_again.load_state_dict(of_handle)
    for step in range(at, 8):
        train_step(run, step, wrapped_again, again, optimizer_again)
    return identical(outcome(model, optimizer, handle), outcome(again, optimizer_again, handle_again))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("whose", ["its own", "rank 0's"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_resumes_bit_exactly(at, whose, mode):
    run = Run(rows=RUN.rows, rate=0.8, mode=mode)
    assert ranks.run(resumed, 2, run, at, whose, "bernoulli") == [True, True]


def test_a_fixed_number_of_rows_resumes_bit_exactly():
    assert ranks.run(resumed, 2, RUN, 3, "its own", "fixed") == [True, True]


def between_micro_batches(run: Run) -> bool:
    """Does a run resume between two micro-batches of a FREEZE step, with the gradients so far?"""
    model, handle, wrapped, optimizer = start(run)
    train_step(run, 0, wrapped, model, optimizer)
    rank = dist.get_rank()
    with wrapped.no_sync():
        loss(wrapped(batch(model, run.rows[rank][0], 1, 0, rank))).backward()
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    again, handle_again, wrapped_again, optimizer_again = start(run, example_inputs=model.rows(2, 0))
    again.load_state_dict(state[0])
    optimizer_again.load_state_dict(state[1])
    handle_again.load_state_dict(state[2])
    for parameter, gradient in zip(again.parameters(), gradients, strict=True):
        parameter.grad = gradient

    for m, w, o in ((model, wrapped, optimizer), (again, wrapped_again, optimizer_again)):
        loss(w(batch(m, run.rows[rank][1], 1, 1, rank))).backward()
        o.step()
        o.zero_grad()
        train_step(run, 2, w, m, o)
    return identical(outcome(model, optimizer, handle), outcome(again, optimizer_again, handle_again))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_resumes_between_micro_batches(mode):
    assert ranks.run(between_micro_batches, 2, Run(rows=RUN.rows, rate=0.8, mode=mode)) == [True, True]


def saved(run: Run) -> dict[str, Any]:
    model, handle, wrapped, optimizer = start(run)
    train_step(run, 0, wrapped, model, optimizer)
    return handle.state_dict()


def loaded(run: Run, state: dict[str, Any], early: bool) -> tuple[str | None, bool]:
    """The error of loading a state, and whether the handle is as it was before."""
    model = run.build()
    handle = rdp.attach(model, run.rate, mode=run.mode, example_inputs=model.rows(2, 0) if early else None)
    before = handle.state_dict()
    try:
        handle.load_state_dict(state)
    except rdp.StateError as error:
        return str(error), identical(before, handle.state_dict())
    return None, handle.step_count == 1 and handle.phase is rdp.Phase.FREEZE


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("others", [1, 3])
def test_another_number_of_ranks_is_refused_in_row_mode(others, early):
    state = ranks.run(saved, 2, RUN)[0]
    for message, untouched in ranks.run(loaded, others, RUN, state, early):
        assert message is not None
        assert f"saved by 2 ranks and is loaded by {others}" in message
        assert "state['ranks']" in message
        assert untouched
    for message, continues in ranks.run(loaded, others, RUN, state | {"ranks": others}, early):
        assert message is None
        assert continues


def test_another_number_of_ranks_is_fine_in_batch_mode():
    """Its masks do not depend on the rank."""
    run = Run(rows=RUN.rows, rate=0.8, mode="batch")
    state = ranks.run(saved, 2, run)[0]
    for message, continues in ranks.run(loaded, 3, run, state, True):
        assert message is None
        assert continues
