"""Branches that a model runs now, but did not when its branches were found: another way through it was chosen since.

A model that grows, or lets later blocks join after some epochs, has such. Nobody gates them, so they train plainly.
"""

from __future__ import annotations

from collections.abc import Set
from contextlib import nullcontext, suppress

import torch

from rdp.calls import Inputs
from rdp.choose import selected
from rdp.discovery import forwards
from rdp.discovery.find import traced
from rdp.known import Known
from rdp.look import discovered
from rdp.training.run import Run


def late_branches(run: Run, inputs: Inputs) -> tuple[str, ...]:
    """Names of the branches in a forward of these inputs that train, and are none of the run's.

    None are named where a look could not be one process's own doing (several of them, sharded parameters), where the
    user has named the branches, and where the forward cannot be made.
    """
    model, options = run.model, run.options
    if run.several or forwards.only_device(model) is None or options.named:
        return ()
    owned = {name for branch in run.branches for name in branch.parameters}
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad} - owned
    with torch.inference_mode(False), run.paused(), forwards.undisturbed(model):
        for mode in (nullcontext(), forwards.as_in_training(model)):  # what is for training alone runs only then
            with suppress(Exception), mode:
                given = run.rows.take(inputs, 2) if run.rows is not None and options.mode == "row" else inputs
                if late := _with_parameters(run, given, trained):
                    return late
    return ()


def _with_parameters(run: Run, inputs: Inputs, some: Set[str]) -> tuple[str, ...]:
    """Names of the branches that have one of these parameters."""
    for (graph,) in traced(run.model, inputs):
        found = discovered(run.model, run.options, graph, Known())
        if found.accepted:
            branches = found.branches(selected(run.model, run.options, found))
            return tuple(branch.name for branch in branches if not some.isdisjoint(branch.parameters))
    return ()
