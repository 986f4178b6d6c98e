"""What happens when the attached model is called: masks are decided before, and the graph is completed after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rdp import gates, setup, traced
from rdp.discovery.trace import tensors_in
from rdp.errors import ForwardError
from rdp.forward import Forward, calls_running, in_backward, in_reentrant_checkpoint
from rdp.slots import present

if TYPE_CHECKING:
    from rdp.run import Run


def begin(
    run: Run, discover: Callable[..., None], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """The model is about to run: a training forward finds the branches, if they are not known, and gets its masks.

    Raises:
        ForwardError: If `module` is another than the attached one, or there are no rows to mask.
    """
    if module is not run.model:
        raise ForwardError(
            f"this {type(module).__name__} is a replica or a shallow copy of the attached model, as "
            "torch.nn.DataParallel makes them. Use DistributedDataParallel, or attach to the copy itself"
        )
    run.traced_masks = None
    if run.forwards.running and not in_backward():
        run.forget_interrupted(calls_running(module) - 1)
    if run.pauses or not module.training or not torch.is_grad_enabled():
        run.forwards.begin(None)
        return
    if in_backward():
        run.forwards.begin_recomputed()
        return
    try:
        rows = setup.check_inputs(args, kwargs)
        if not run.branches:
            discover(args, kwargs)
            if callable(unshard := getattr(module, "unshard", None)):
                unshard()  # FSDP has sharded the model again after the forwards of discovery
        masks = run.draw_masks(rows)
    except BaseException:
        run.forwards.begin(None)  # `end` is called even so
        raise
    run.forwards.begin(Forward(run.progress.phase, masks))
    if traced.may_be_compiled():  # parts of the model, while the model itself is called by Python
        run.traced_masks = masks.to(next(module.parameters()).device, non_blocking=True)


def end(run: Run, output: Any) -> Any:
    """The model has returned, or raised; returns its output in another form, or None to leave it."""
    forward = run.forwards.end()
    run.traced_masks = None
    if forward is not None and forward.has_raised():
        run.progress.take_back(forward.masks)
        return None
    if forward is None or not torch.is_grad_enabled():
        return None
    floating = [(leaf, x) for leaf, x in enumerate(tensors_in(output)) if x.is_floating_point()]
    learning = [(leaf, x) for leaf, x in floating if x.requires_grad]
    if not floating or (learning and not run.agreement.several):
        return None
    # Without this, a backward of nothing but frozen branches has no graph, and DistributedDataParallel waits for the
    # gradients of branches that are out of the graph on this rank.
    parameters = [p for group in run.by_branch for p in present(group) if p.requires_grad]
    for leaf, x in learning[:1] or floating:  # where nothing has a graph, any of them may be what the loss is made of
        output = gates.replace_leaf(output, leaf, gates.link(x, parameters))
    return output


def may_leave_no_graph(run: Run) -> bool:
    """May a branch whose rows are all alike be left out of the graph?"""
    # A checkpoint that is recomputed for its graph may hold nothing but this branch. And with a mask for each row,
    # another process may need what this one does not: sharded gradients are reduced by all or by none.
    alike = run.options.mode == "batch" or not run.agreement.several
    return alike and not in_reentrant_checkpoint()
