"""The oracle: a run of several ranks in one process, and comparisons with it.

It sees all ranks' rows as one batch, in which every rank's part is masked as that rank masks it and has the same weight
in the loss, since DistributedDataParallel averages gradients over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from laws import masks
from laws.oracle import branches_of_parameters, live_parameters, oracle_forward
from laws.training import identical
from torch import Tensor, nn

from distributed.models import OPTIMIZERS
from distributed.training import Run, batch, loss, outcome


def train_alone(run: Run, present: Callable[[int], Sequence[int]] | None = None) -> dict[str, Any]:
    """Train on all ranks' rows in one process, masked by hand.

    Args:
        run: The run.
        present: Tells which ranks have data in a step; all by default.
    """
    model = run.build()
    optimizer = OPTIMIZERS[run.optimizer](model.parameters())
    used = branches_of_parameters(copy.deepcopy(model).eval(), model.rows(2, 0))
    frozen = []
    for step in range(run.steps):
        rates = run.rates(step)
        phase = ["DROP", "FREEZE"][step % 2] if any(rates) else "PLAIN"
        live: set[str] = set()
        with_data = range(run.ranks) if present is None else present(step)
        for k in range(max(map(len, run.rows))):
            parts = [(rank, run.rows[rank][k]) for rank in with_data if k < len(run.rows[rank])]
            x = torch.cat([batch(model, rows, step, k, rank) for rank, rows in parts])
            kept = torch.cat([draw(run, rows, step, k, rank) for rank, rows in parts], dim=1)
            live |= live_parameters(used, kept, phase, rates)
            output = oracle_forward(model, x, kept, phase, rates, run.freeze)
            losses = [loss(part) for part in output.split([rows for _, rows in parts])]
            (torch.stack(losses).sum() / run.ranks).backward()
        for name, parameter in model.named_parameters():
            if name not in live:
                parameter.grad = None
        if run.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()
        frozen.append({name for name, _ in model.named_parameters() if name not in live})
    return outcome(model, optimizer) | {"frozen": frozen}


def draw(run: Run, rows: int, step: int, k: int, rank: int) -> Tensor:
    """The masks of micro-batch `k` of a step on a rank."""
    drawn = masks.draw(
        run.rates(step),
        rows,
        seed=0,
        cycle=step // 2,
        micro_batch=k,
        mode=run.mode,
        rank=rank,
        fixed_among=rows if run.sampling == "fixed" else None,
    )
    return torch.tensor(drawn)


def ranks_differ(run: Run) -> bool:
    """Is some branch live on one rank and dead on another, in some step of the run?"""
    for step in range(run.steps):
        live = []
        for rank, rows in enumerate(run.rows):
            kept = torch.cat([draw(run, count, step, k, rank) for k, count in enumerate(rows)], dim=1)
            live.append((kept if step % 2 == 0 else ~kept).any(1))
        if any(not torch.equal(live[0], other) for other in live[1:]):
            return True
    return False


CLOSE = {"rtol": 1e-7, "atol": 1e-9}
"""For 50 steps in float64."""


def assert_replicas(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether all ranks ended with the same bits; what they ended with."""
    first, *others = results
    for rank, other in enumerate(others, start=1):
        for name, held in first["parameters"].items():
            assert identical(held, other["parameters"][name]), f"{name} differs between rank 0 and {rank}"
        assert identical(first, other), f"rank 0 and {rank} differ"
    return first


def assert_as_alone(result: dict[str, Any], run: Run, rtol: float = CLOSE["rtol"], atol: float = CLOSE["atol"]) -> None:
    """Whether a run ended as the oracle's, with the same parameters frozen in each step."""
    assert_same(result, train_alone(run), rtol, atol)


def assert_same(
    result: dict[str, Any], expected: dict[str, Any], rtol: float = CLOSE["rtol"], atol: float = CLOSE["atol"]
) -> None:
    """Whether a run ended as `expected`, with the same parameters frozen in each step."""
    assert result["frozen"] == expected["frozen"]
    for name, held in expected["parameters"].items():
        close = {"rtol": rtol, "atol": atol, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(result["parameters"][name], held, **close)
