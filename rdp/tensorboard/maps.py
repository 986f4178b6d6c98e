"""From features to small pictures: one map a channel, and which layers and channels of a large network are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rdp.errors import ArgumentError

_LEADING_TOKENS = (0, 1, 2, 4, 5)


@dataclass(frozen=True)
class Layer:
    """One layer of a feature panel. Layers of equal shapes in a row are a stage: channel c of one is channel c of all.

    Attributes:
        maps: `Tensor[H, h, w]`, one map a channel (of an MLP, a node).
        weights: `Tensor[H, H']` from the H' channels of the layer before (which need not be shown), or None.
        tokens: `Tensor[H, k]`, values that belong to no place of the map, such as those of a class token; or None.
        blank: How many of the last entries of a map are no values; they are drawn grey.
        extent: What a map's pixels are, such as "over 50 x 50 points"; its height and width if empty.
        name: What is written over it; its number if empty.
    """

    maps: Tensor
    weights: Tensor | None = None
    tokens: Tensor | None = None
    blank: int = 0
    extent: str = ""
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """What layers of a stage have in common."""
        return (*self.maps.shape, self.leading, self.blank)

    @property
    def leading(self) -> int:
        """The number of `tokens`."""
        return 0 if self.tokens is None else self.tokens.shape[1]


def evenly(total: int, at_most: int | None) -> list[int]:
    """The rule by which large networks are sampled down: `at_most` indices, evenly spaced, first and last included.

    Args:
        total: Number of layers or channels.
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


def layer_of(
    values: Tensor,
    grid_size: int | None = None,
    *,
    width: int | None = None,
    text: bool = False,
    weights: Tensor | None = None,
    name: str = "",
) -> Layer:
    """Arrange a layer's features as one map a channel. Of images and sequences, the first of the N inputs is shown.

    Args:
        values: A layer, `Tensor[N, ...]`: `[N, H]` on the points of a grid, or of any N inputs, which are then the
            map's pixels, row by row; `[N, H, h, w]` (channels first) or `[N, h, w, H]` (channels last); `[N, T, H]`,
            tokens, which are an image if their number is a square, after 0, 1, 2, 4 or 5 leading ones as ViTs have them
            for the class, distillation and registers, and else are the map's pixels, row by row.
        grid_size: Side of the grid that the inputs are, for `[N, H]`.
        width: H, if known; it tells which axis has the channels. Else 4 axes are channels last if h == w != H.
        text: Are tokens those of a text, of which none leads?
        weights: As in `Layer`.
        name: As in `Layer`.

    Returns:
        The layer, float32, on the CPU.

    Raises:
        ArgumentError: If the shape is none of these.
    """
    values = values.detach().float().cpu()
    if values.dim() == 2:
        if grid_size is not None:
            return Layer(
                node_maps(values, grid_size), weights, extent=f"over {grid_size} x {grid_size} points", name=name
            )
        return _rows(values.T, weights, "inputs", name)
    if values.dim() == 3:
        first = values[0]
        sequence = first if first.shape[0] == width != first.shape[1] else first.T  # [H, T]
        leading = sequence.shape[1] - math.isqrt(sequence.shape[1]) ** 2
        if text or leading not in _LEADING_TOKENS or sequence.shape[1] == leading:
            return _rows(sequence, weights, "tokens" if text else "places", name)
        apart = sequence[:, :leading] if leading else None
        side = math.isqrt(sequence.shape[1])
        return Layer(sequence[:, leading:].reshape(-1, side, side), weights, apart, name=name)
    if values.dim() == 4 and width is not None and [size == width for size in values.shape[1:]].count(True) == 1:
        return Layer(values[0].movedim(list(values.shape[1:]).index(width), 0), weights, name=name)
    return Layer(node_maps(values, grid_size), weights, name=name)


def node_maps(values: Tensor, grid_size: int | None = None) -> Tensor:
    """Arrange a layer's features as one map a node; `layer_of` knows more shapes.

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
        side = math.isqrt(tokens)
        if tokens - side**2 in _LEADING_TOKENS:
            return values[0, tokens - side**2 :].T.reshape(-1, side, side)
    raise ArgumentError(
        f"features of shape {list(values.shape)} cannot be drawn as maps; they must be [N, H] on a square grid of "
        f"inputs (got grid_size={grid_size}), [N, H, h, w], [N, h, w, H], or [N, T, H] with a square number of tokens"
    )


def sides(count: int) -> tuple[int, int]:
    """Rows and columns of a nearly square arrangement of `count` things."""
    columns = math.ceil(math.sqrt(count))
    return -(-count // columns), columns


def _rows(sequence: Tensor, weights: Tensor | None, what: str, name: str) -> Layer:
    rows, columns = sides(sequence.shape[1])
    blank = rows * columns - sequence.shape[1]
    padded = torch.nn.functional.pad(sequence, (0, blank))
    maps, extent = padded.reshape(-1, rows, columns), f"at {sequence.shape[1]} {what}"
    return Layer(maps, weights, blank=blank, extent=extent, name=name)
