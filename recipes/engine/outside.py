"""What lies in no branch learns in every step, and branches only in half of them: a factor for it in FREEZE steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rdp


def slow_outside(optimizer: torch.optim.Optimizer, handle: rdp.ResidualDropPath, factor: float) -> None:
    """Let what lies in no branch learn less in FREEZE steps.

    Args:
        optimizer: before its first step, not wrapped; its groups are split into those inside and outside of branches.
        handle: whose branches are known.
        factor: of the learning rate; with 0 neither parameters nor their state move.
    """
    named = dict(handle.model.named_parameters())
    inside = {id(named[name]) for branch in handle.branches if branch.rate > 0 for name in branch.parameters}
    outside: list[dict[str, Any]] = []
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if id(p) in inside]
        rest = [p for p in parameters if id(p) not in inside]
        if rest:
            optimizer.add_param_group({**group, "params": rest})
            outside.append(optimizer.param_groups[-1])
    hidden: list[tuple[Tensor, Tensor | None]] = []
    rates: list[tuple[dict[str, Any], float]] = []

    def before(*_: object) -> None:
        if handle.phase is rdp.Phase.FREEZE and any(handle.rates):  # else the cycle is plain
            for group in outside:
                rates.append((group, group["lr"]))
                group["lr"] *= factor
                if factor == 0:
                    hidden.extend((p, p.grad) for p in group["params"])
            for parameter, _gradient in hidden:
                parameter.grad = None

    def after(*_: object) -> None:
        for group, rate in rates:
            group["lr"] = rate
        for parameter, gradient in hidden:
            parameter.grad = gradient
        rates.clear()
        hidden.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
