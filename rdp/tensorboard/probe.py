"""What features were made from, shown once and large: images, a text, or the points of the plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as pil
from PIL import ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from rdp.tensorboard.cells import FRAME
from rdp.tensorboard.colors import INK, PAPER, Image
from rdp.tensorboard.legend import font
from rdp.tensorboard.maps import evenly, sides

_OTHERS = 16


@dataclass(frozen=True)
class Images:
    """`Tensor[N, C, h, w]`: the first is the one whose features are shown. Values are stretched to what can be seen."""

    images: Tensor

    def draw(self, side: int, unit: int) -> pil.Image:
        """An image `side` pixels wide, with letters of `unit` pixels."""
        first, others = self.images[:1], self.images[1 : 1 + _OTHERS]
        columns = 4
        small = (side - (columns - 1) * unit // 4) // columns
        rows = -(-len(others) // columns)
        caption = [f"image 1 of {len(self.images)}, {first.shape[2]} x {first.shape[3]}"]
        if len(others):
            caption += ["", "similarity is over these too:" if len(others) == len(self.images) - 1 else "and others:"]
        height = side + int(1.3 * unit * (len(caption) + 1)) + rows * (small + unit // 4)
        canvas = pil.new("RGB", (side, height), PAPER)
        canvas.paste(_picture(first, side), (0, 0))
        top = _write(canvas, caption, side + unit // 2, unit)
        for index in range(len(others)):
            row, column = divmod(index, columns)
            place = (column * (small + unit // 4), top + unit // 4 + row * (small + unit // 4))
            canvas.paste(_picture(others[index : index + 1], small), place)
        return canvas


@dataclass(frozen=True)
class Text:
    """Tokens of a text, laid out row by row as the pixels of its maps are."""

    tokens: Sequence[str]

    def draw(self, side: int, unit: int) -> pil.Image:
        """An image `side` pixels wide, with letters of `unit` pixels or smaller."""
        rows, columns = sides(len(self.tokens))
        cell = side // columns
        caption = [f"{len(self.tokens)} tokens; a map has its", "pixels where they stand here"]
        canvas = pil.new("RGB", (side, cell * rows + int(1.3 * unit * 3)), PAPER)
        draw = ImageDraw.Draw(canvas)
        for index, token in enumerate(self.tokens):
            row, column = divmod(index, columns)
            x, y = column * cell, row * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=FRAME)
            shown = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423")
            size = max(min(int(0.62 * cell), int(1.5 * cell / max(len(shown), 1))), 8)
            draw.text((x + cell // 2, y + cell // 2), shown[:12], fill=INK, font=font(size), anchor="mm")
        _write(canvas, caption, cell * rows + unit // 2, unit)
        return canvas


@dataclass(frozen=True)
class Points:
    """`Tensor[P, 2]` of the square [-1, 1]^2, over which maps are drawn, and their classes, `Tensor[P]`, 0 or 1."""

    points: Tensor
    labels: Tensor

    def draw(self, side: int, unit: int) -> pil.Image:
        """An image `side` pixels wide, with letters of `unit` pixels."""
        plane = np.full((1, side, side, 3), 246, np.uint8)
        draw_points(plane, self.points, self.labels, number=500, radius=max(side // 120, 2))
        plane[:, :2] = plane[:, -2:] = FRAME
        plane[:, :, :2] = plane[:, :, -2:] = FRAME
        caption = [f"{len(self.points):,} training points; maps", "are over this square, [-1, 1]\u00b2"]
        canvas = pil.new("RGB", (side, side + int(1.3 * unit * (len(caption) + 1))), PAPER)
        canvas.paste(pil.fromarray(plane[0]), (0, 0))
        _write(canvas, caption, side + unit // 2, unit)
        return canvas


Probe = Images | Text | Points


def draw_points(cells: Image, points: Tensor, labels: Tensor, number: int, radius: int) -> None:
    """On every cell, class 0 as black dots with a white rim and class 1 the other way round: seen on any ground.

    Args:
        cells: `uint8[n, side, side, 3]`, of the square [-1, 1]^2, drawn on.
        points: `Tensor[P, 2]`.
        labels: `Tensor[P]`, 0 or 1.
        number: How many are drawn at most.
        radius: Of a dot, with its rim, in pixels.
    """
    side = cells.shape[1]
    shown = torch.tensor(evenly(len(points), number))
    at = (points[shown].detach().cpu() * torch.tensor([1.0, -1.0]) + 1) * (side - 1) / 2
    places = at.round().int().clamp(radius, side - 1 - radius).tolist()
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    far = dy**2 + dx**2
    disc, core = far <= (radius + 0.3) ** 2, far <= (radius - 0.7) ** 2
    for (x, y), label in zip(places, labels[shown].cpu().tolist(), strict=True):
        patch = cells[:, y - radius : y + radius + 1, x - radius : x + radius + 1]
        rim, fill = (INK, PAPER) if label == 1 else (PAPER, INK)
        patch[:, disc] = rim
        patch[:, core] = fill


def _picture(image: Tensor, side: int) -> pil.Image:
    """`Tensor[1, C, h, w]` as a square picture; three channels are colours, of others the mean is shown."""
    image = image.detach().float().cpu()
    image = image if image.shape[1] == 3 else image.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=1e-12)
    size = (
        max(side * image.shape[2] // max(image.shape[2:]), 1),
        max(side * image.shape[3] // max(image.shape[2:]), 1),
    )
    shrinks = size[0] < image.shape[2]
    mode = {"mode": "bilinear", "antialias": True} if shrinks else {"mode": "nearest-exact"}
    scaled = interpolate(image, size, **mode)[0]
    return pil.fromarray((255 * scaled.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())


def _write(canvas: pil.Image, lines: Sequence[str], top: int, unit: int) -> int:
    """Write lines below each other; returns where the next would begin."""
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        size = unit
        while font(size).getlength(line) > canvas.width and size > 8:
            size -= 1
        draw.text((0, top), line, fill=INK, font=font(size))
        top += int(1.3 * unit)
    return top
