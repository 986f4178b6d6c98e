"""The paper's Figure 1 as one composed image: every channel's map, and the weights between them, layer by layer.

All pixels are made with a few array operations. One matplotlib Axes a node would take minutes for a 32 x 65 panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image as pil
from PIL import ImageColor, ImageDraw
from torch import Tensor

from rdp.errors import ArgumentError
from rdp.tensorboard.cells import FRAME, LINES_SHOWN, blank_pixels, colored, crossed, resized, weight_lines
from rdp.tensorboard.colors import INK, PAPER, UNDEFINED, Floats, Image, SignedScale, signed_colors
from rdp.tensorboard.layout import FEW, Column, Layout, arrange, stage_lines, token_side
from rdp.tensorboard.legend import Legend, font
from rdp.tensorboard.maps import Layer
from rdp.tensorboard.probe import Points, Probe, draw_points

_RULE = (120, 120, 120)


def feature_panel(
    layers: Sequence[Layer],
    *,
    title: str = "Features",
    points: Tensor | None = None,
    labels: Tensor | None = None,
    probe: Probe | None = None,
    max_layers: int | None = 8,
    max_nodes: int | None = 6,
    unit: str = "node",
) -> Image:
    """Draw what every channel computes, layer by layer, and the weights between them.

    For an MLP on the plane this is the H x (2N + 1) grid of section 3.1 of the paper. Layers of equal shapes form a
    stage, in which a row is the same channel in all columns; where shapes change the panel is broken and rows are
    numbered anew.

    Args:
        layers: What enters the first layer, and N layers.
        title: First line of the image.
        points: Training points, `Tensor[P, 2]` in [-1, 1]^2, if maps are drawn over that square: the lines on which
            features are 0 are then drawn too, and about a hundred of the points over the last layer.
        labels: Their classes, `Tensor[P]`, 0 or 1.
        probe: What the features were made from, to be shown once, on the left; default: the points, if any.
        max_layers: Number of layers shown besides the first, chosen by `evenly`; None shows all.
        max_nodes: Number of channels shown in each layer, chosen by `evenly`; None shows all.
        unit: What a channel is called: "node" or "channel".

    Returns:
        The image, `uint8[height, width, 3]`, for a screen of two pixels a point. The same colour means the same feature
        value in all maps.

    Raises:
        ArgumentError: If there is no layer beside the first, or a map is empty or holds NaN or infinite values.
    """
    return feature_film(
        {"": layers},
        title=title,
        points=points,
        labels=labels,
        probe=probe,
        max_layers=max_layers,
        max_nodes=max_nodes,
        unit=unit,
    )


def feature_film(
    moments: Mapping[str, Sequence[Layer]],
    *,
    title: str = "Features over training",
    points: Tensor | None = None,
    labels: Tensor | None = None,
    probe: Probe | None = None,
    max_layers: int | None = 8,
    max_nodes: int | None = 6,
    unit: str = "node",
) -> Image:
    """The paper's Figure 4: a feature panel for each of several moments, below each other, with one colour scale.

    Args:
        moments: The layers by what stands over them, such as "epoch 3"; all are of one network.
        title: First line of the image.
        points: As in `feature_panel`.
        labels: As in `feature_panel`.
        probe: As in `feature_panel`.
        max_layers: As in `feature_panel`.
        max_nodes: As in `feature_panel`.
        unit: As in `feature_panel`.

    Returns:
        The image, `uint8[height, width, 3]`.

    Raises:
        ArgumentError: As `feature_panel`.
    """
    for layers in moments.values():
        _check(layers)
    if probe is None and points is not None and labels is not None:
        probe = Points(points, labels)
    first = next(iter(moments.values()))
    layout = arrange(first, max_layers, max_nodes, unit, probe is not None)
    sizes = layout.sizes
    shown = [layers[column.layer].maps[column.channels] for layers in moments.values() for column in layout.columns]
    scale = SignedScale.of(np.concatenate([maps.detach().float().cpu().numpy().ravel() for maps in shown]))
    parts = [_Part(layers, layout, scale) for layers in moments.values()]
    heaviest = max((part.heaviest for part in parts), default=0.0)
    on_plane = points is not None
    drawn = [
        part.draw(heaviest, unit, sizes.contour if on_plane else 0, probe if index == 0 else None)
        for index, part in enumerate(parts)
    ]
    if points is not None and labels is not None:
        for part in drawn:
            _dots(part, layout, points, labels)
    dotted = points is not None and labels is not None
    legend = _legend(layout, parts, scale, heaviest, on_plane=on_plane, dotted=dotted)
    names = [name or _subtitle(first, layout, unit) for name in moments]
    lines = [font(sizes.title, bold=True).getlength(title), *(font(sizes.text).getlength(name) for name in names)]
    left = layout.columns[0].left
    width = max(layout.stages[-1].right, math.ceil(max(lines)), left + legend.widest) + 2 * sizes.gap
    below = legend.draw(width, left)
    image = pil.new("RGB", (width, sum(map(len, (*drawn, below)))), PAPER)
    draw = ImageDraw.Draw(image)
    top = 0
    for name, part in zip(names, drawn, strict=True):
        image.paste(pil.fromarray(part), (0, top))
        draw.text((sizes.gap, top + sizes.gap + int(1.25 * sizes.title)), name, fill=INK, font=font(sizes.text))
        top += len(part)
    image.paste(pil.fromarray(below), (0, top))
    draw.text((sizes.gap, sizes.gap), title, fill=INK, font=font(sizes.title, bold=True))
    return np.asarray(image)


def _check(layers: Sequence[Layer]) -> None:
    if len(layers) < 2:
        raise ArgumentError(f"a feature panel shows the input and at least one layer; got {len(layers)} layers in all")
    for number, layer in enumerate(layers):
        shape = list(layer.maps.shape)
        if layer.maps.dim() != 3 or layer.maps.numel() == 0:
            raise ArgumentError(f"layer {number}: maps must be Tensor[H, h, w], not empty; got shape {shape}")
        if not layer.maps.isfinite().all():
            raise ArgumentError(f"layer {number} holds NaN or infinite values; has training diverged?")


class _Part:
    """The panel of one moment, but for title and legend."""

    def __init__(self, layers: Sequence[Layer], layout: Layout, scale: SignedScale) -> None:
        self.layers, self.layout, self.scale = layers, layout, scale
        self.weights = {column.layer: _weights(layers[column.layer], column) for column in layout.columns}
        self.heaviest = max(
            (float(np.abs(w).max(initial=0)) for w in self.weights.values() if w is not None), default=0.0
        )
        self.has_zeros = False

    def draw(self, heaviest: float, unit: str, contour: int, probe: Probe | None) -> Image:
        """`uint8[height, width, 3]`."""
        layout, sizes = self.layout, self.layout.sizes
        left = None if probe is None else probe.draw(sizes.probe, sizes.text)
        height = max(layout.top(layout.rows), 0 if left is None else sizes.header + left.height)
        canvas = np.full((height, layout.stages[-1].right, 3), PAPER, np.uint8)
        for column in layout.columns:
            w = self.weights[column.layer]
            if w is not None and heaviest > 0:
                right = column.left - layout.apart
                lines = weight_lines(w / heaviest, layout)
                canvas[sizes.header : sizes.header + len(lines), right - sizes.strip : right] = lines
            self._maps(canvas, column, contour)
        image = pil.fromarray(canvas)
        if left is not None:
            image.paste(left, (sizes.gap, sizes.header))
        self._words(ImageDraw.Draw(image), unit, probe is not None)
        return np.asarray(image).copy()

    def _maps(self, canvas: Image, column: Column, contour: int) -> None:
        layout, sizes, layer = self.layout, self.layout.sizes, self.layers[column.layer]
        some = layer.maps[column.channels].detach().float().cpu()
        colors = colored(resized(some, sizes.cell), self.scale, contour)
        colors[:, blank_pixels(layer, sizes.cell)] = ImageColor.getrgb(UNDEFINED)
        zero = (some == 0).flatten(1).all(dim=1).tolist()
        for row, cell in enumerate(colors):
            top, left = layout.top(row), column.left
            canvas[top - 2 : top + sizes.cell + 2, left - 2 : left + sizes.cell + 2] = FRAME
            canvas[top : top + sizes.cell, left : left + sizes.cell] = crossed(cell) if zero[row] else cell
        self.has_zeros |= any(zero)
        if layer.tokens is not None:
            values = layer.tokens[column.channels].detach().float().cpu().numpy()
            side = token_side(layout, values.shape[1])
            squares = signed_colors(self.scale.positions(values))
            for row, token in np.ndindex(*values.shape):
                top, left = layout.top(row) + token * side, column.left - layout.apart
                canvas[top : top + side, left : left + side] = FRAME
                canvas[top + 1 : top + side - 1, left + 1 : left + side - 1] = squares[row, token]

    def _words(self, draw: ImageDraw.ImageDraw, unit: str, probed: bool) -> None:
        layout, sizes = self.layout, self.layout.sizes
        letters = font(sizes.text)
        line = int(1.25 * sizes.text)
        base = sizes.header - sizes.gap
        if probed:
            draw.text((sizes.gap, base), "made from", fill=INK, font=letters, anchor="ls")
        for number, stage in enumerate(layout.stages):
            rule = base - line - sizes.text // 3
            draw.line((stage.left, rule, stage.right, rule), fill=_RULE, width=3)
            lines = stage_lines(self.layers[stage.columns[0].layer], unit, stage, sizes)
            for index, text in enumerate(reversed(lines)):
                draw.text((stage.left, rule - sizes.text // 4 - line * index), text, INK, letters, "ls")
            if number:
                middle = stage.left - 3 * sizes.gap // 2
                for top in range(rule, layout.top(layout.rows), 3 * sizes.gap):
                    draw.line((middle, top, middle, top + sizes.gap), fill=_RULE, width=3)
            draw.text((stage.numbered, base), unit, INK, letters, "rs")
            for row, channel in enumerate(stage.columns[0].channels):
                draw.text((stage.numbered, layout.top(row) + sizes.cell // 2), str(channel), INK, letters, "rm")
            for column in stage.columns:
                name = self.layers[column.layer].name or str(column.layer)
                draw.text((column.left + sizes.cell // 2, base), name, INK, letters, "ms")


def _subtitle(layers: Sequence[Layer], layout: Layout, unit: str) -> str:
    columns = layout.columns
    few = any(len(column.channels) < len(layers[column.layer].maps) for column in columns)
    chosen = f"{layout.rows} {unit}s of each, evenly spaced" if few else f"every {unit}"
    of = f"all {len(layers) - 1}" if len(columns) == len(layers) else f"{len(columns) - 1} of {len(layers) - 1}"
    same = f"; a row is one {unit}" + (" up to the next break" if len(layout.stages) > 1 else "")
    return f"{of} layers, {chosen}{same}"


def _legend(
    layout: Layout,
    parts: Sequence[_Part],
    scale: SignedScale,
    heaviest: float,
    *,
    on_plane: bool,
    dotted: bool,
) -> Legend:
    legend = Legend(layout.sizes.text)
    legend.scale("feature value (log scale)", scale)
    if heaviest > 0:
        which = "" if layout.rows <= FEW else f" (the {LINES_SHOWN} largest of each layer)"
        legend.lines(f"weight, widest {heaviest:.2g}{which}")
    if on_plane:
        legend.zero("feature is 0")
    if dotted:
        legend.dots("class 0, class 1")
    if any(part.has_zeros for part in parts):
        legend.cross("0 everywhere")
    if leading := max(layer.leading for layer in parts[0].layers):
        which = "the leading token (class)" if leading == 1 else f"the {leading} leading tokens (class, registers)"
        legend.squares(f"left of a map: {which}")
    return legend


def _dots(image: Image, layout: Layout, points: Tensor, labels: Tensor) -> None:
    sizes, column = layout.sizes, layout.columns[-1]
    for row in range(len(column.channels)):
        top = layout.top(row)
        cell = image[None, top : top + sizes.cell, column.left : column.left + sizes.cell]
        draw_points(cell, points, labels, sizes.dots, sizes.dot)


def _weights(layer: Layer, column: Column) -> Floats | None:
    if layer.weights is None or not column.joined or layer.weights.shape[1] <= column.channels[-1]:
        return None
    shown: Floats = layer.weights.detach().float().cpu()[column.channels][:, column.channels].numpy()
    return shown
