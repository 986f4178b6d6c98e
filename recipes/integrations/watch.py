"""A line for every optimizer step that shows its phase and which branches moved; it works in any framework."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import rdp


class Watch:
    """Print after every optimizer step which branches moved (`#`) and which stayed bit-identical (`.`).

    In batch mode a DROP step and the FREEZE step after it complement each other, but for branches of rate 0, which
    always learn::

        step  0 DROP    ##.#..#.
        step  1 FREEZE  ###.##.#
    """

    def __init__(self, handle: rdp.ResidualDropPath, optimizer: Optimizer) -> None:
        self.handle = handle
        self.before: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._print)

    def _remember(self, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in self.handle.model.named_parameters()}

    def _print(self, *_: Any) -> None:
        now = dict(self.handle.model.named_parameters())
        moved = {name for name, old in self.before.items() if not torch.equal(old, now[name])}
        marks = "".join("#" if moved & set(branch.parameters) else "." for branch in self.handle.branches)
        print(f"step {self.handle.step_count:2} {self.handle.phase.name:6}  {marks}")
