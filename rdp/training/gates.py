"""Algorithm 1: what a gate makes of the output of a branch. Pure functions of the output, the phase and the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rdp import trees
from rdp.branches import Point
from rdp.errors import ForwardError
from rdp.phases import Phase


def undropped(phase: Phase, x: Tensor, source: Tensor | None = None, keep_prob: float | Tensor | None = None) -> Tensor:
    """What undropped rows become: in DROP they stay as they are, in FREEZE their value is kept and nothing learns.

    Args:
        phase: DROP or FREEZE.
        x: Branch output; or, with `source`, the output of a block `source + f(source)` whose branch is out of reach.
        source: The input of that block.
        keep_prob: What DROP divides by, as timm's `drop_path(scale_by_keep=True)` does; None: nothing.

    Source: Algorithm 1.
    """
    if phase is Phase.FREEZE:
        return x.detach() if source is None else x.detach() + (source - source.detach())
    if keep_prob is None:
        return x
    # To the bit as timm computes it: the reciprocal in the dtype of x, and a product.
    if isinstance(keep_prob, Tensor):  # so that a compiled graph serves for all rates
        return x * keep_prob.to(torch.promote_types(x.dtype, torch.float32)).reciprocal().to(x.dtype)
    return x * x.new_ones(()).div_(keep_prob)


def dropped(phase: Phase, x: Tensor, source: Tensor | None = None) -> Tensor | float:
    """What dropped rows become: in DROP zero, or the input of the block; in FREEZE they stay as they are, and learn.

    Source: Algorithm 1.
    """
    if phase is Phase.FREEZE:
        return x
    return 0.0 if source is None else source


def acts(phase: Phase, keep: bool, scaled: bool) -> bool:
    """Does `gate` change anything where all rows are alike? `scaled` is whether it is given a `keep_prob`."""
    return keep if phase is Phase.FREEZE else scaled or not keep


def gate(
    phase: Phase, keep: Tensor | bool, x: Tensor, source: Tensor | None = None, keep_prob: float | Tensor | None = None
) -> Tensor:
    """Gate a branch output, row by row or as a whole.

    Constants and detached outputs leave no graph behind, so where all rows are alike nothing is computed backwards for
    nothing.

    Args:
        phase: DROP or FREEZE.
        keep: Bool tensor that broadcasts to `x`, `True` for undropped rows; a bool if all rows are alike.
        x, source, keep_prob: See `undropped`.
    """
    if keep is True:
        return undropped(phase, x, source, keep_prob)
    lost = dropped(phase, x, source)
    if isinstance(keep, Tensor):
        # And not a product: `where` keeps the dtype under autocast, and `0 * inf` would be nan.
        return torch.where(keep, undropped(phase, x, source, keep_prob), lost)
    if lost is x:
        return x
    # In the dtype that the block returns, which autocast may have changed; and a copy, since it may be written to.
    return lost.to(x.dtype, copy=True) if isinstance(lost, Tensor) else torch.zeros_like(x)


def cut(keep: Tensor | bool, x: Tensor, elements: Tensor | None) -> Tensor:
    """What FREEZE makes of a factor of the branch that is not made from its x: undropped rows teach it nothing.

    In DROP there is nothing to do: what is multiplied by zero gets no gradient.

    Args:
        keep: Bool tensor that broadcasts to `x`, `True` for undropped rows; a bool if all rows are alike.
        x: The factor, or something that it is made of.
        elements: Bool tensor that broadcasts to `x`, `True` for what belongs to this branch; None: all does.

    Source: Algorithm 1, where the whole product is detached.
    """
    if elements is not None and keep is not False:
        keep = elements if keep is True else keep & elements
    return gate(Phase.FREEZE, keep, x)


def broadcast_rows(keep: Tensor, x: Tensor, point: Point) -> Tensor:
    """Shape a mask of N rows so that it broadcasts to `x`.

    Args:
        keep: Bool `Tensor[N]`.
        x: The tensor to mask; its row axis has N entries, or a multiple of N where tokens or views are folded into it.
        point: Tells that axis; without one, as in batch mode, the mask is the same in all rows.

    Raises:
        ForwardError: If the length of the axis is no multiple of N.
    """
    if point.rows is None:
        return keep[0]
    axis = point.rows.axis
    rows, length = keep.shape[0], x.shape[axis]
    if length != rows:
        fold, rest = divmod(length, rows)
        outer = point.rows.outer_of(fold)
        if rest or outer is None:
            raise ForwardError(
                f"the {point.side} of `{point.module}` has shape {tuple(x.shape)}, whose axis {axis} should hold the "
                f"{rows} rows of the batch; its layout differs from the forward in which branches were found. Remove "
                "the handle and attach again with example_inputs of the present form, or use mode='batch'"
            )
        keep = keep.repeat_interleave(fold // outer)
        keep = keep.repeat(outer) if outer > 1 else keep
    shape = [1] * x.dim()
    shape[axis] = length
    return keep.view(shape)


class _Link(torch.autograd.Function):
    """The identity, through which further tensors get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = others  # only their shapes are used, so a later in-place write to them is no error
        return x.clone()  # an output that is its input would be a view, which forbids in-place operations

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], *(torch.zeros_like(other) for other in ctx.others)


def link_output(output: Any, others: Sequence[Tensor]) -> Any:
    """What a model returned, with further tensors in its graph that get a gradient of zero.

    Args:
        output: Any container. One tensor with a graph is copied; where none has one, all are, since any of them may be
            what the loss is made of.
        others: Parameters that would otherwise be missing from the graph.
    """
    floating = [(number, x) for number, x in enumerate(trees.tensors(output)) if x.is_floating_point()]
    for number, x in [pair for pair in floating if pair[1].requires_grad][:1] or floating:
        output = trees.with_tensor(output, number, _Link.apply(x, *others))
    return output
