"""Parts of a model that are compiled while the model itself is not: what they are given of its forwards.

The model's own hook begins a forward, in Python. Then torch chooses for each part among the graphs that it has of it,
before any hook of ours is called, so what they depend on must lie ready by then, also where a checkpoint runs a part
again in a backward.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from rdp import frames
from rdp.training import compiled, switches
from rdp.training.step import Forward, order, sent
from rdp.training.switches import Switch

if TYPE_CHECKING:
    from rdp.training.run import Run


def given(run: Run, forward: Forward) -> compiled.Given:
    """What compiled parts of a model are given of a forward that is not compiled; without such, nothing is copied."""
    masks = forward.masks
    if not run.compiles:
        return compiled.Given(masks)
    run.step.comes = functools.partial(_recomputed, run)
    device = next(run.model.parameters()).device
    keep_probs = sent(compiled.keep_probs_of(run), device) if run.options.scale_by_keep else None
    if run.options.mode == "batch":
        switches.turn(run, forward, keep_probs)
        if not any(switch.dense for switch in run.switches.values()):
            return compiled.Given(masks, keep_probs=keep_probs)
    return compiled.Given(
        sent(masks, device), sent(order(masks), device) if compiled.in_order(run) else None, keep_probs
    )


def _recomputed(run: Run, forward: Forward | None) -> None:
    """A backward has come to a forward, whose checkpoints run compiled parts again; None: it is over.

    No hook of ours is called before torch chooses among the graphs of such a part.
    """
    if run.calls.running:
        return
    if forward is None:
        over(run)
    else:
        run.compiled = given(run, forward)
        allow_graphs(run)


@compiled.constant
def ready(run: int) -> bool:
    """A part of the model is being compiled, not the whole, which has a ticket: copy what it is given. See `traced`."""
    this = compiled.run_of(run)
    if this.calls.running and not this.compiles:
        this.compiles = True
        allow_graphs(this)
        if (forward := this.calls.running[-1]) is not None:
            this.compiled = given(this, forward)
    return True


def switched(run: Run, switch: Switch) -> bool:
    """Does the switch of a branch tell what its gates do in a graph that is being traced, and no mask?"""
    ready(id(run))
    now = run.compiled
    in_part = now is not None and now.ticket is None and run.options.mode == "batch"
    return in_part and not switch.dense and learns(run)


def learns(run: Run) -> bool:
    """Is what is being traced run for gradients, be it that a checkpoint makes them when it runs it again?"""
    return torch.is_grad_enabled() or checkpointed(id(run))


@compiled.constant
def checkpointed(run: int) -> bool:
    """Is a part being traced in the first run of a checkpoint with use_reentrant=True, which has no gradients?

    Torch does not guard that: a part that is called in both ways in one model, so and under `torch.no_grad()`, has one
    graph for both, that of the first call.
    """
    return bool(compiled.run_of(run).calls.running) and any(map(frames.is_autograd_function, frames.callers()))


@compiled.constant
def visible(run: int) -> bool:
    """May a graph write down that it was run? Not what is inside of a checkpoint, where torch allows no such thing."""
    tx = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    outside: bool = tx.output.is_root_tracer()
    compiled.run_of(run).watch.unseen |= not outside
    return outside


@compiled.constant
def counted(run: int) -> bool:
    """One more gate is traced that is switched: are there not too many of them in one graph?"""
    this, graph = compiled.run_of(run), torch._guards.CompileContext.current_trace_id()
    before, number = this.counted
    this.counted = graph, number + 1 if graph == before else 1
    fits = this.counted[1] <= switches.MOST
    this.watch.crowded |= not fits
    return fits


def allow_graphs(run: Run) -> None:
    """Let torch make as many graphs for each branch as it usually makes for all blocks of one class.

    It counts those of all blocks of a class together, though each has hooks of its own, and past its limit it would run
    them in Python, in silence. It has its limit back when the model, or a backward, has returned. `cache_size_limit` is
    what torch 2.6 calls the `recompile_limit`, and a name for it ever since.
    """
    if run.graphs is None:
        config = torch._dynamo.config
        run.graphs = config.cache_size_limit
        config.cache_size_limit *= max(len(run.branches), 1)


def over(run: Run) -> None:
    """A forward in Python has ended, or a backward of such."""
    run.compiled = None
    if run.graphs is not None:
        torch._dynamo.config.cache_size_limit, run.graphs = run.graphs, None
