"""What a gate does to the output of a branch: pure functions of the output and a row mask.

`torch.where` and not a product: it keeps the dtype under autocast, and `0 * inf` would be nan.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rdp.errors import ForwardError


def drop_rows(x: Tensor, keep: Tensor, keep_prob: float | None = None) -> Tensor:
    """Zero the dropped rows of a branch output; they get no gradient.

    Args:
        x: Branch output, `Tensor[N, ...]`.
        keep: Bool tensor that broadcasts to `x`, `True` for undropped rows.
        keep_prob: Divide undropped rows by this, as timm's `drop_path(scale_by_keep=True)` does; None: do not.

    Source: Algorithm 1, DROP.
    """
    return torch.where(keep, x if keep_prob is None else rescale(x, keep_prob), 0.0)


def rescale(x: Tensor, keep_prob: float) -> Tensor:
    """`x / keep_prob`, to the bit as timm computes it: the reciprocal in the dtype of `x`, and a product."""
    return x * x.new_ones(()).div_(keep_prob)


def freeze_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Leave a branch output as it is, but let only dropped rows have a gradient.

    Args:
        x: Branch output, `Tensor[N, ...]`.
        keep: Bool tensor that broadcasts to `x`, `True` for undropped rows, which are frozen.

    Source: Algorithm 1, FREEZE.
    """
    return torch.where(keep, x.detach(), x)


def drop_block(out: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """DROP for a block `out = x + f(x)` whose branch cannot be reached: dropped rows pass `x` on.

    Args:
        out: Block output, `Tensor[N, ...]`.
        x: Block input of the same shape.
        keep: Bool tensor that broadcasts to both, `True` for undropped rows.
    """
    return torch.where(keep, out, x)


def freeze_block(out: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """FREEZE for a block `out = x + f(x)`: the value is `out`; undropped rows have the gradient of `x` alone.

    Args:
        out: Block output, `Tensor[N, ...]`.
        x: Block input of the same shape.
        keep: Bool tensor that broadcasts to both, `True` for undropped rows, whose branch is frozen.
    """
    return torch.where(keep, out.detach() + (x - x.detach()), out)


def broadcast_rows(keep: Tensor, x: Tensor, axis: int, name: str) -> Tensor:
    """Shape a mask of N rows so that it broadcasts to `x`.

    Args:
        keep: Bool `Tensor[N]`.
        x: The tensor to mask; its `axis` has N entries, or a multiple of N where tokens are folded into the batch.
        axis: The batch axis of `x`.
        name: Qualified module name, for the error.

    Raises:
        ForwardError: If the length of `axis` is no multiple of N.
    """
    rows, length = keep.shape[0], x.shape[axis]
    if length != rows:
        fold, rest = divmod(length, rows)
        if rest:
            raise ForwardError(
                f"the output of `{name}` has shape {tuple(x.shape)}, whose axis {axis} should hold the {rows} rows of "
                "the batch; its layout differs from the forward in which branches were found. Remove the handle and "
                "attach again with example_inputs of the present form, or use mode='batch'"
            )
        keep = keep.repeat_interleave(fold)
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


def link(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`x`, in whose graph `others` take part with a gradient of zero.

    Args:
        x: Any tensor; pass a small one, since it is copied.
        others: Parameters that would otherwise be missing from the graph.
    """
    linked: Tensor = _Link.apply(x, *others)
    return linked


def replace_leaf(output: Any, leaf: int, new: Tensor) -> Any:
    """`output`, with tensor number `leaf` replaced, counted as `tensors_in` does.

    The tuples, lists, sets, mappings and dataclasses around it are copied, so that what else they hold is the same.
    """
    position = -1

    def changed(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {key: rebuilt for key, item in items if (rebuilt := rebuild(item)) is not item}

    def rebuild(value: Any) -> Any:
        nonlocal position
        if isinstance(value, Tensor):
            position += 1
            return new if position == leaf else value
        if isinstance(value, (Mapping, list)):
            items = changed(value.items() if isinstance(value, Mapping) else enumerate(value))
            return _with_items(value, items) if items else value
        if isinstance(value, (tuple, set)):
            parts = [rebuild(item) for item in value]
            if all(part is item for part, item in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            attributes = changed((f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value))
            return _with_attributes(value, attributes) if attributes else value
        return value

    return rebuild(output)


def _with_items(value: Any, items: Mapping[Any, Any]) -> Any:
    copied = copy.copy(value)  # and not `type(value)(...)`: a subclass may be made of other arguments
    for key, item in items.items():
        copied[key] = item
    return copied


def _with_attributes(value: Any, attributes: Mapping[str, Any]) -> Any:
    copied = copy.copy(value)
    for name, attribute in attributes.items():
        object.__setattr__(copied, name, attribute)  # it may be frozen
    return copied
