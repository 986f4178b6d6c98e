"""The paper's Figure 1 as one composed image: every node's map, and the weights between them, layer by layer.

All pixels are made with a few array operations. One matplotlib Axes a node would take minutes for a 32 x 65 panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as pil
from PIL import ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from rdp.errors import ArgumentError
from rdp.tensorboard.colors import INK, PAPER, Floats, Image, SignedScale, signed_colors
from rdp.tensorboard.legend import Legend, font
from rdp.tensorboard.maps import evenly

_FEW = 8
"""Up to this many nodes all weights are drawn, and cells are large."""
_STRONGEST = 2
"""With more nodes, only so many weights into each node are drawn."""


@dataclass(frozen=True)
class Layer:
    """One layer of the panel.

    Attributes:
        maps: `Tensor[H, h, w]`, one map a node.
        weights: `Tensor[H, H']` from the H' nodes of the layer before (which need not be shown), or None.
    """

    maps: Tensor
    weights: Tensor | None = None


def feature_panel(
    layers: Sequence[Layer],
    *,
    title: str = "Features",
    points: Tensor | None = None,
    labels: Tensor | None = None,
    max_layers: int | None = 6,
    max_nodes: int | None = 6,
) -> Image:
    """Draw the H x (2N + 1) grid of section 3.1 of the paper: the input, then weights and node maps of each layer.

    Args:
        layers: The input and N layers.
        title: First line of the image.
        points: Training points, `Tensor[P, 2]` in [-1, 1]^2, if maps are drawn over that square: the lines on which
            features are 0 are then drawn too, and about a hundred of the points over the last layer.
        labels: Their classes, `Tensor[P]`, 0 or 1.
        max_layers: Number of layers shown besides the input, chosen by `evenly`; None shows all.
        max_nodes: Number of nodes shown in each layer, chosen by `evenly`; None shows all.

    Returns:
        The image, `uint8[height, width, 3]`. The same colour means the same feature value in all maps.

    Raises:
        ArgumentError: If there is no layer beside the input, or a map is empty or holds NaN or infinite values.
    """
    _check(layers)
    numbers = [0, *(1 + number for number in evenly(len(layers) - 1, max_layers))]
    nodes = [evenly(len(layers[number].maps), max_nodes) for number in numbers]
    rows = max(len(some) for some in nodes)
    sizes = _LARGE if rows <= _FEW and len(numbers) <= _FEW else _SMALL
    maps = [_resized(layers[n].maps[some], sizes.cell) for n, some in zip(numbers, nodes, strict=True)]
    weights = [_shown_weights(layers[n].weights if n else None, some) for n, some in zip(numbers, nodes, strict=True)]
    scale = SignedScale.of(np.concatenate([some.ravel() for some in maps]))
    heaviest = max((float(np.abs(w).max(initial=0)) for w in weights if w is not None), default=0.0)

    margin = 16 + int(max(font(sizes.text).getlength(str(node)) for node in ("layer", *nodes[-1])))
    steps = [sizes.cell + (sizes.gap if w is None else sizes.strip) for w in weights[1:]]
    lefts = [margin + sum(steps[:number]) for number in range(len(numbers))]
    width = max(lefts[-1] + sizes.cell, sizes.narrowest, int(font(sizes.title, bold=True).getlength(title))) + margin
    canvas = np.full((sizes.header + rows * sizes.pitch, width, 3), PAPER, np.uint8)
    for left, some, w in zip(lefts, maps, weights, strict=True):
        if w is not None and heaviest > 0:
            canvas[sizes.header :, left - sizes.strip : left] = _weight_lines(w / heaviest, rows, sizes)
        colors = _map_images(some, scale, sizes.contour if points is not None else 0)
        if some is maps[-1] and points is not None and labels is not None:
            _draw_points(colors, points, labels, sizes)
        for row, colored in enumerate(colors):
            top = sizes.header + row * sizes.pitch
            canvas[top - 1 : top + sizes.cell + 1, left - 1 : left + sizes.cell + 1] = _FRAME
            canvas[top : top + sizes.cell, left : left + sizes.cell] = colored

    legend = Legend(sizes.text)
    legend.scale("feature value (log scale)", scale)
    if heaviest > 0:
        which = "" if rows <= _FEW else f" ({_STRONGEST} strongest into each node)"
        legend.lines(f"weight, widest {heaviest:.2g}{which}")
    if points is not None:
        legend.zero("feature is 0")
        if labels is not None:
            legend.dots("class 0, class 1")
    image = pil.fromarray(np.concatenate([canvas, legend.draw(width, margin)]))
    draw = ImageDraw.Draw(image)
    draw.text((sizes.gap, sizes.gap), title, fill=INK, font=font(sizes.title, bold=True))
    sampled = "" if len(numbers) == len(layers) and rows == len(layers[-1].maps) else ", evenly spaced"
    subtitle = f"{len(numbers) - 1} of {len(layers) - 1} layers, {rows} of {len(layers[-1].maps)} nodes{sampled}"
    draw.text((sizes.gap, sizes.gap + int(1.4 * sizes.title)), subtitle, fill=INK, font=font(sizes.text))
    draw.text((margin - 8, sizes.header - 10), "layer", fill=INK, font=font(sizes.text), anchor="rs")
    for number, left in zip(numbers, lefts, strict=True):
        name = str(number) if number else "input" if sizes is _LARGE else "in"
        middle = left + sizes.cell // 2
        draw.text((middle, sizes.header - 10), name, fill=INK, font=font(sizes.text), anchor="ms")
    for row, node in enumerate(nodes[-1]):
        middle = sizes.header + row * sizes.pitch + sizes.cell // 2
        draw.text((margin - 8, middle), str(node), fill=INK, font=font(sizes.text), anchor="rm")
    return np.asarray(image)


@dataclass(frozen=True)
class _Sizes:
    """All sizes, in pixels; `dots` is a number of training points."""

    cell: int
    strip: int
    gap: int
    title: int
    text: int
    contour: int
    header: int
    narrowest: int
    dots: int

    @property
    def pitch(self) -> int:
        """From one row to the next."""
        return self.cell + self.gap


# TensorBoard shows images about 300 pixels wide: few nodes, with large letters, can be read even so.
_LARGE = _Sizes(cell=84, strip=58, gap=8, title=34, text=26, contour=2, header=136, narrowest=640, dots=120)
# One pixel a point of the paper's grid; the letters are for an image three times as wide.
_SMALL = _Sizes(cell=50, strip=46, gap=6, title=48, text=26, contour=1, header=150, narrowest=900, dots=60)
_FRAME = (190, 190, 190)


def _check(layers: Sequence[Layer]) -> None:
    if len(layers) < 2:
        raise ArgumentError(f"a feature panel shows the input and at least one layer; got {len(layers)} layers in all")
    for number, layer in enumerate(layers):
        shape = list(layer.maps.shape)
        if layer.maps.dim() != 3 or layer.maps.numel() == 0:
            raise ArgumentError(f"layer {number}: maps must be Tensor[H, h, w], not empty; got shape {shape}")
        if not layer.maps.isfinite().all():
            raise ArgumentError(f"layer {number} holds NaN or infinite values; has training diverged?")


def _resized(maps: Tensor, cell: int) -> Floats:
    maps = maps.detach().float().cpu()
    # The pixels of an image model are shown as they are; a grid is a sampled function, and smooth.
    mode = "nearest-exact" if min(maps.shape[1:]) < 32 else "bilinear"
    if maps.shape[1:] != (cell, cell):
        maps = interpolate(maps[None], (cell, cell), mode=mode)[0]
    result: Floats = maps.numpy()
    return result


def _shown_weights(weights: Tensor | None, nodes: list[int]) -> Floats | None:
    if weights is None:
        return None
    sources = [node for node in nodes if node < weights.shape[1]]
    shown: Floats = weights.detach().float().cpu()[nodes][:, sources].numpy()
    return shown


def _map_images(maps: Floats, scale: SignedScale, contour: int) -> Image:
    """Colour the maps; where they change sign, draw a line that is `contour` pixels wide."""
    colors = signed_colors(scale.positions(maps))
    positive = maps > 0
    edge = np.zeros_like(positive)
    for shift in range(1, contour + 1):
        edge[:, :, shift:] |= positive[:, :, shift:] != positive[:, :, :-shift]
        edge[:, shift:] |= positive[:, shift:] != positive[:, :-shift]
    colors[edge] = INK
    return colors


def _weight_lines(weights: Floats, rows: int, sizes: _Sizes) -> Image:
    """Lines from the nodes of the layer before (left) to those of this one (right), the strongest on top.

    Args:
        weights: `[rows shown, sources shown]`, in [-1, 1].
    """
    sharp = 2  # drawn at twice the size, then averaged: smooth lines
    image = pil.new("RGB", (sharp * sizes.strip, sharp * rows * sizes.pitch), PAPER)
    draw = ImageDraw.Draw(image)
    strength = np.abs(weights)
    if rows > _FEW:
        weakest_shown = np.sort(strength, axis=1)[:, -_STRONGEST:][:, :1]
        strength = np.where(strength >= weakest_shown, strength, 0)
    colors = signed_colors(np.sign(weights) * np.sqrt(strength))
    middle = sharp * (np.arange(rows) * sizes.pitch + sizes.cell // 2)
    targets, sources = np.nonzero(strength > 0.02)  # what is weaker could not be seen
    for index in np.argsort(strength[targets, sources]):
        target, source = int(targets[index]), int(sources[index])
        r, g, b = colors[target, source].tolist()
        width = max(1, round(sharp * sizes.cell / 14 * float(strength[target, source])))
        draw.line((0, int(middle[source]), image.width, int(middle[target])), fill=(r, g, b), width=width)
    return np.asarray(image.reduce(sharp))


def _draw_points(cells: Image, points: Tensor, labels: Tensor, sizes: _Sizes) -> None:
    """On every cell, class 0 as black dots and class 1 as white ones with a black rim."""
    shown = torch.tensor(evenly(len(points), sizes.dots))
    at = (points[shown].detach().cpu() * torch.tensor([1.0, -1.0]) + 1) * (sizes.cell - 1) / 2
    x, y = at.round().int().clamp(1, sizes.cell - 2).T.numpy()
    is_one = labels[shown].cpu().numpy() == 1
    around: list[tuple[int, int]] = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for color, some, offsets in (
        (INK, is_one, around),
        (PAPER, is_one, [(0, 0)]),
        (INK, ~is_one, [(0, 0), (0, -1), (-1, 0), (-1, -1)]),
    ):
        for dy, dx in offsets:
            cells[:, y[some] + dy, x[some] + dx] = color
