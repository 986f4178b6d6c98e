"""One training run, described once: what every rank does in it, and what it ended with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from laws.architectures import Architecture
from laws.oracle import branch_rates
from laws.training import Spy, snapshot
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import rdp
from distributed.models import MODELS, OPTIMIZERS, WRAPPERS


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        rows: For each rank the rows of each micro-batch of a step.
        attach: "before" wrapping, to the "inner" module after it, or to the "wrapper".
        accumulate: "no_sync" in all micro-batches but the last, or "sync" in all of them.
        validate: On one of the ranks validate after each micro-batch.
    """

    model: str = "mlp"
    rows: tuple[tuple[int, ...], ...] = ((4,), (4,))
    mode: str = "row"
    rate: float = 0.5
    rate_schedule: Callable[[int], float] | None = None
    decay: str = "linear"
    sampling: str = "bernoulli"
    freeze: str = "output"
    steps: int = 20
    optimizer: str = "sgd"
    wrapper: str = "default"
    attach: str = "before"
    accumulate: str = "no_sync"
    validate: bool = False
    checkpointed: bool = False
    autocast: bool = False
    clip: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return len(self.rows)

    def build(self) -> Architecture:
        """The untrained model, the same everywhere."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[self.model]().to(self.dtype).train()

    def attached(self, model: nn.Module) -> rdp.ResidualDropPath:
        """A handle on `model`."""
        return rdp.attach(
            model,
            self.rate,
            rate_schedule=self.rate_schedule,
            mode=self.mode,
            decay=self.decay,
            sampling=self.sampling,
            freeze=self.freeze,
        )

    def rates(self, step: int) -> list[float]:
        """The drop probability of each branch in a step: FREEZE has those of the DROP before it."""
        factor = 1.0 if self.rate_schedule is None else self.rate_schedule(step - step % 2)
        return branch_rates(self.build().blocks, self.rate * factor, self.decay)


def batch(model: Architecture, rows: int, step: int, k: int, rank: int) -> Tensor:
    """The inputs of micro-batch `k` of a step on a rank."""
    return model.rows(rows, seed=1000 * step + 10 * k + rank)


def loss(output: Tensor) -> Tensor:
    """The mean over rows of a loss whose labels are the rows' numbers modulo 2."""
    return F.cross_entropy(output, torch.arange(len(output)) % 2)


def train_step(run: Run, step: int, wrapped: nn.Module, model: Architecture, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on this rank's rows.

    Args:
        run: The run.
        step: The number of the step.
        wrapped: What is called.
        model: What is inside of it.
        optimizer: Made by `handle.wrap`.
    """
    rank = dist.get_rank()
    rows = run.rows[rank]
    for k, count in enumerate(rows):
        last = k == len(rows) - 1 or run.accumulate == "sync"
        last |= step == 0 and run.wrapper == "static_graph"  # whose first step torch cannot accumulate
        x = batch(model, count, step, k, rank)
        with contextlib.nullcontext() if last else wrapped.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
                output = wrapped(x)
            loss(output.to(run.dtype)).backward()
        if run.validate and rank == 1:
            validate(model)
    if run.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    optimizer.step()
    optimizer.zero_grad()


def validate(model: Architecture) -> None:
    """Look at the model in the middle of a step, in eval mode and in train mode without gradients."""
    with torch.no_grad():
        model(model.rows(3, 0))
        model.eval()
        model(model.rows(3, 0))
        model.train()


def train(run: Run) -> dict[str, Any]:
    """Train on this rank of a process group; what `outcome` tells, and the frozen parameters of every step."""
    model = run.build()
    handle = run.attached(model) if run.attach == "before" else None
    wrapped = WRAPPERS[run.wrapper](model)
    if handle is None:
        handle = run.attached(wrapped if run.attach == "wrapper" else model)
    if run.checkpointed:
        checkpoint_blocks(model)
    inner = OPTIMIZERS[run.optimizer](wrapped.parameters())
    optimizer, spy, frozen = handle.wrap(inner), Spy(inner, model), []
    for step in range(run.steps):
        train_step(run, step, wrapped, model, optimizer)
        frozen.append({name for name, gradient in spy.gradients.items() if gradient is None})
    return outcome(model, inner, handle) | {"frozen": frozen}


def outcome(
    model: nn.Module, optimizer: torch.optim.Optimizer, handle: rdp.ResidualDropPath | None = None
) -> dict[str, Any]:
    """Parameters and their optimizer state by name, the phase and the number of steps."""
    where = {} if handle is None else {"phase": handle.phase.name, "step_count": handle.step_count}
    return {"parameters": snapshot(model, optimizer), **where}


def full(value: Any) -> Any:
    """Nested containers in which each `DTensor` is replaced by the whole tensor."""
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(full, value))
    return value.full_tensor() if isinstance(value, DTensor) else value


def checkpoint_blocks(model: Architecture) -> None:
    """Recompute each block's activations in the backward."""
    for block in model.body:
        block.forward = lambda x, forward=block.forward: checkpoint(forward, x, use_reentrant=False)
