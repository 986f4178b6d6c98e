"""The masks of a forward: drawn in DROP, and kept for the steps that replay it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rdp import masks
from rdp.options import Options
from rdp.phases import Phase
from rdp.training.step import Draw, Step


def drawn(step: Step, draw: Draw, rows: int, options: Options, seed: int, rank: int) -> tuple[Tensor, Draw]:
    """The masks of a forward of `rows` rows, not to be written to, and what it has drawn, with them."""
    if step.given is not None:
        return step.given.clone(), draw
    if step.phase is Phase.PLAIN:
        return torch.ones(len(step.rates), rows, dtype=torch.bool, device="cpu"), draw
    if draw.masks is not None and rows <= draw.rows:
        return draw.masks[:, :rows], draw
    made = masks.draw(
        step.rates,
        rows,
        seed=seed,
        cycle=step.cycle,
        micro_batch=draw.number,
        mode=options.mode,
        rank=rank,
        fixed_among=draw.rows if options.sampling == "fixed" else None,
    )
    return made, replace(draw, masks=made) if rows == draw.rows else draw
