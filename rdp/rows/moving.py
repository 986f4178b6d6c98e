"""Taking rows out of a tensor, and putting them in their places again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rdp.branches import RowAxis


def take(x: Tensor, where: RowAxis, rows: Tensor) -> Tensor:
    """The entries of `rows` alone, int64 `Tensor[rows]`, in that order."""
    return x.index_select(where.axis, _entries(where, rows))


def put(part: Tensor, rows: Tensor, rest: Tensor | None, others: Tensor, where: RowAxis) -> Tensor:
    """A tensor of all rows: `part` in the places of `rows`, and `rest` in those of the `others`; None: zeros."""
    given = part, _entries(where, rows), rest, _entries(where, others), where.axis
    # A compiler sees for itself what the backward needs.
    return _placed(*given) if torch.compiler.is_compiling() else _Put.apply(*given)


class _Put(torch.autograd.Function):
    """What `_placed` does, keeping none of the numbers for the backward.

    `index_copy` would keep what it has copied, a whole activation a branch, of which it needs the shape.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, entries: Tensor, rest: Tensor | None, others: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(entries, others)
        ctx.axis = axis
        return _placed(part, entries, rest, others, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        entries, others = ctx.saved_tensors
        of_part = gradients[0].index_select(ctx.axis, entries) if ctx.needs_input_grad[0] else None
        of_rest = gradients[0].index_select(ctx.axis, others) if ctx.needs_input_grad[2] else None
        return of_part, None, of_rest, None, None


def _placed(part: Tensor, entries: Tensor, rest: Tensor | None, others: Tensor, axis: int) -> Tensor:
    shape = list(part.shape)
    shape[axis] = len(entries) + len(others)
    # Each row is written once: what is moved costs more than anything else here.
    out = part.new_empty(shape).index_copy_(axis, entries, part)
    return out.index_fill_(axis, others, 0) if rest is None else out.index_copy_(axis, others, rest)


def _entries(where: RowAxis, rows: Tensor) -> Tensor:
    """The entries of an axis that belong to `rows`."""
    if where.fold == 1:
        return rows
    return (rows[:, None] * where.fold + torch.arange(where.fold, device=rows.device)).flatten()
