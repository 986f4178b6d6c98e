"""What the hooks of the attached model itself do: a training forward begins, and ends.

What a compiler sees of them is in `compiled.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from rdp import refusals, trees
from rdp.errors import ForwardError
from rdp.training import gates, parts, switches
from rdp.training.step import next_node

if TYPE_CHECKING:
    from rdp.training.run import Run


@_disable_dynamo  # a compiler must not look into it, even where it has given up on the caller
def begin(run: Run, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The model is called: a training forward finds the branches, if they are not known, and gets its masks.

    Raises:
        ForwardError: If `module` is another than the attached one, or its rows cannot be masked.
    """
    refusals.check_attached_one(module, run.model)
    calls, forward, in_backward = run.calls, None, torch._C._current_graph_task_id() != -1
    if not in_backward:
        run.compiled = None  # a backward that raised has left it
        if calls.running:
            calls.forget_interrupted(module)
    try:
        if run.pauses or not module.training or not torch.is_grad_enabled():
            return
        if in_backward:
            forward = calls.of_backward(run.step)
            if forward is not None:
                return
            raise ForwardError(refusals.CHECKPOINTED)
        refusals.check_rows_apart()
        if not run.branches:
            run.discover(args, kwargs)
            if callable(unshard := getattr(module, "unshard", None)):
                unshard()  # FSDP has sharded the model again after the forwards of discovery
        elif run.watch.detour:
            run.look_again((args, kwargs))
        forward = run.begin_forward(refusals.count_rows(run.rows, (args, kwargs), run.options.mode))
        forward.running, forward.nodes = True, (next_node(), 0)
        run.first.called((args, kwargs), forward)
        run.compiled = parts.given(run, forward)
    finally:
        calls.running.append(forward)  # in any case, since `end` is called even after an error
        if run.compiles:
            parts.allow_graphs(run)


@_disable_dynamo
def end(run: Run, module: nn.Module, args: Any, output: Any) -> Any:
    """The model has returned, or raised; returns its output in another form, or None to leave it."""
    parts.over(run)
    forward = run.calls.running.pop() if run.calls.running else None
    if forward is None or not forward.running:  # which is over already where it was recomputed
        run.watch.evaluations += not (run.pauses or module.training)
        return None
    forward.reached |= switches.reached(run) if run.compiles else set()
    run.watch.reached |= forward.reached
    forward.running, forward.nodes = False, (forward.nodes[0], next_node())
    if sys.exception() is not None and id(sys.exception()) != forward.handling:
        forward.spent = True  # it has raised, and not in the midst of handling an error from before
        return None
    returned, linked = list(trees.tensors(output)), None
    run.first.returned(run, forward, returned)
    if torch.is_grad_enabled() and (run.several or not any(x.requires_grad for x in returned)):
        # Without this, a backward of nothing but frozen branches has no graph, and DistributedDataParallel waits
        # for the gradients of branches that are out of the graph on this rank.
        linked = gates.link_output(output, run.frozen.trainable())
        returned = list(trees.tensors(linked))
    for x in returned:
        if x.requires_grad:
            run.step.mark(forward, x)
    forward.learnt = forward.graph is None  # where no backward could be seen, it is taken for granted
    return linked
