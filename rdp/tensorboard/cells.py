"""The pixels of a feature panel: maps, and the lines of the weights between them. A few array operations each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image as pil
from PIL import ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from rdp.tensorboard.colors import INK, PAPER, Floats, Image, SignedScale, signed_colors
from rdp.tensorboard.layout import FEW, Layout
from rdp.tensorboard.maps import Layer

LINES_SHOWN = 16
"""With more than a few nodes, only so many weights between two layers are drawn: more merge into bars."""

FRAME = (190, 190, 190)
"""Thin lines around things."""


def resized(maps: Tensor, cell: int) -> Floats:
    """Maps as large as cells."""
    # The pixels of an image model are shown as they are; a grid is a sampled function, and smooth.
    mode = "nearest-exact" if min(maps.shape[1:]) < 32 else "bilinear"
    if maps.shape[1:] != (cell, cell):
        maps = interpolate(maps[None], (cell, cell), mode=mode)[0]
    result: Floats = maps.numpy()
    return result


def blank_pixels(layer: Layer, cell: int) -> npt.NDArray[np.bool_]:
    """Which pixels of a cell belong to no value."""
    flat = np.arange(layer.maps[0].numel()) >= layer.maps[0].numel() - layer.blank
    height, width = layer.maps.shape[1:]
    at = ((np.arange(cell) + 0.5) / cell)[:, None] * [height, width]
    blank: npt.NDArray[np.bool_] = flat.reshape(height, width)[at[:, 0].astype(int)[:, None], at[:, 1].astype(int)]
    return blank


def colored(maps: Floats, scale: SignedScale, contour: int) -> Image:
    """Colour the maps; where they change sign, draw a line that is `contour` pixels wide."""
    colors = signed_colors(scale.positions(maps))
    if not contour:
        return colors
    positive = maps > 0
    edge = np.zeros_like(positive)
    for shift in range(1, contour + 1):
        edge[:, :, shift:] |= positive[:, :, shift:] != positive[:, :, :-shift]
        edge[:, shift:] |= positive[:, shift:] != positive[:, :-shift]
    colors[edge] = INK
    return colors


def crossed(cell: Image) -> Image:
    """Two thin diagonals: there is nothing to see, on purpose."""
    image = pil.fromarray(cell)
    draw = ImageDraw.Draw(image)
    side = image.width - 1
    draw.line((0, 0, side, side), fill=FRAME, width=2)
    draw.line((0, side, side, 0), fill=FRAME, width=2)
    return np.asarray(image)


def weight_lines(weights: Floats, layout: Layout) -> Image:
    """Lines from the nodes of the layer before (left) to those of this one (right), the strongest on top.

    Args:
        weights: `[rows shown, rows shown]`, in [-1, 1].
        layout: Of the panel.
    """
    sizes, rows = layout.sizes, len(weights)
    sharp = 2  # drawn at twice the size, then averaged: smooth lines
    image = pil.new("RGB", (sharp * sizes.strip, sharp * rows * sizes.pitch), PAPER)
    draw = ImageDraw.Draw(image)
    strength = np.abs(weights)
    least = 0.05 if rows <= FEW else np.sort(strength, axis=None)[-LINES_SHOWN:][0]
    colors = signed_colors(np.sign(weights) * np.sqrt(strength))
    middle = sharp * (np.arange(rows) * sizes.pitch + sizes.cell // 2)
    targets, sources = np.nonzero((strength >= least) & (strength > 0))  # what is weaker could not be seen
    for index in np.argsort(strength[targets, sources]):
        target, source = int(targets[index]), int(sources[index])
        r, g, b = colors[target, source].tolist()
        width = max(2, round(sharp * sizes.line * float(strength[target, source])))
        draw.line((0, int(middle[source]), image.width, int(middle[target])), fill=(r, g, b), width=width)
    return np.asarray(image.reduce(sharp))
