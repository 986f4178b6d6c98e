"""From features to small pictures: one map a node, and which layers and nodes of a large network are shown."""

from __future__ import annotations

import torch
from torch import Tensor

from rdp.errors import ArgumentError

_LEADING_TOKENS = (0, 1, 2, 4, 5)


def evenly(total: int, at_most: int | None) -> list[int]:
    """The rule by which large networks are sampled down: `at_most` indices, evenly spaced, first and last included.

    Args:
        total: Number of layers or nodes.
        at_most: How many to keep, at least 1; None keeps all.

    Returns:
        Rising indices below `total`.

    Raises:
        ArgumentError: If `at_most` is less than 1.
    """
    if at_most is not None and at_most < 1:
        raise ArgumentError(f"at least 1 layer and 1 node must be shown; got {at_most}")
    count = total if at_most is None else min(total, at_most)
    return torch.linspace(0, total - 1, count).round().int().tolist()


def node_maps(values: Tensor, grid_size: int | None = None) -> Tensor:
    """Arrange a layer's features as one map a node.

    Args:
        values: A layer, `Tensor[N, ...]`: `[N, H]` on the points of a grid; or, of which the first of the N inputs is
            shown, `[N, H, h, w]` (channels first), `[N, h, w, H]` (channels last, recognised by h == w != H) or
            `[N, T, H]` (tokens: a square number of them, after 0, 1, 2, 4 or 5 leading ones, as ViTs have them for the
            class, distillation and registers).
        grid_size: Side of the grid that the inputs are, for `[N, H]`.

    Returns:
        `Tensor[H, h, w]`, float32, on the CPU.

    Raises:
        ArgumentError: If the shape is none of these.
    """
    values = values.detach().float().cpu()
    if values.dim() == 2 and grid_size is not None and len(values) == grid_size**2:
        return values.T.reshape(-1, grid_size, grid_size)
    if values.dim() == 4:
        _, first, second, third = values.shape
        return values[0].permute(2, 0, 1) if first == second != third else values[0]
    if values.dim() == 3:
        tokens = values.shape[1]
        side = int(tokens**0.5)
        if tokens - side**2 in _LEADING_TOKENS:
            return values[0, tokens - side**2 :].T.reshape(-1, side, side)
    raise ArgumentError(
        f"features of shape {list(values.shape)} cannot be drawn as maps; they must be [N, H] on a square grid of "
        f"inputs (got grid_size={grid_size}), [N, H, h, w], [N, h, w, H], or [N, T, H] with a square number of tokens"
    )
