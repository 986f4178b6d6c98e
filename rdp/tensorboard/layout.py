"""Where everything of a feature panel stands: which layers, which channels of each stage, and at which pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rdp.tensorboard.legend import font
from rdp.tensorboard.maps import Layer, evenly

FEW = 8
"""Up to this many channels and layers cells are large, and all weights are drawn."""


@dataclass(frozen=True)
class Sizes:
    """All sizes, in pixels, for a screen with two of them a point; `dots` is a number of training points."""

    cell: int
    strip: int
    gap: int
    title: int
    text: int
    line: int
    contour: int
    dots: int
    dot: int
    probe: int

    @property
    def pitch(self) -> int:
        """From one row to the next."""
        return self.cell + self.gap

    @property
    def header(self) -> int:
        """Height of all that stands above the cells."""
        return int(1.7 * self.title + 6.2 * self.text)


LARGE = Sizes(cell=168, strip=124, gap=16, title=52, text=36, line=12, contour=3, dots=120, dot=4, probe=440)
# More pixels than points of the paper's grid; the letters are for an image three times as wide.
SMALL = Sizes(cell=80, strip=76, gap=8, title=90, text=46, line=4, contour=2, dots=24, dot=2, probe=760)


@dataclass(frozen=True)
class Column:
    """One layer that is shown.

    Attributes:
        layer: Its number; 0 is what enters the first layer.
        channels: Those that are shown, from the top.
        left: The left edge of its maps; what is apart from the map, such as a class token, stands left of it.
        joined: Is the column before it that of the layer before, so that weights lead from there to here?
    """

    layer: int
    channels: list[int]
    left: int
    joined: bool


@dataclass(frozen=True)
class Stage:
    """Columns of equal shapes, in which a row is one channel.

    Attributes:
        columns: From the left.
        left: The left edge of it all.
        right: The right edge of it all.
        numbered: The right edge of the channels' numbers, and of the word above them.
    """

    columns: list[Column]
    left: int
    right: int
    numbered: int


@dataclass(frozen=True)
class Layout:
    """The whole panel."""

    sizes: Sizes
    stages: list[Stage]
    apart: int
    """Width of what stands left of a map: the tokens that belong to no place."""

    @property
    def columns(self) -> list[Column]:
        """Those of all stages."""
        return [column for stage in self.stages for column in stage.columns]

    @property
    def rows(self) -> int:
        """The largest number of channels."""
        return max(len(column.channels) for column in self.columns)

    def top(self, row: int) -> int:
        """The upper edge of the maps in a row."""
        return self.sizes.header + row * self.sizes.pitch


def arrange(layers: Sequence[Layer], max_layers: int | None, max_nodes: int | None, unit: str, probe: bool) -> Layout:
    """Choose what is shown, and find places for it.

    Args:
        layers: What enters the first layer, and N layers.
        max_layers: As in `feature_panel`.
        max_nodes: As in `feature_panel`.
        unit: "channel" or "node".
        probe: Is there room to keep on the left?
    """
    numbers = [0, *(1 + number for number in evenly(len(layers) - 1, max_layers))]
    rows = max(len(evenly(len(layers[number].maps), max_nodes)) for number in numbers)
    sizes = LARGE if rows <= FEW and len(numbers) <= FEW + 1 else SMALL
    most = max(layer.leading for layer in layers)
    apart = most and _token_side(sizes, most) + sizes.gap
    x = sizes.gap + (sizes.probe + 2 * sizes.gap if probe else 0)
    stages: list[Stage] = []
    for group in _groups(numbers, layers):
        first = layers[group[0]]
        labels = evenly(len(first.maps), max_nodes)
        left = x
        x += max(_length(sizes, text) for text in (unit, str(labels[-1])))
        numbered = x
        x += sizes.gap + max((_length(sizes, first.name) - sizes.cell) // 2 - apart, 0)
        columns: list[Column] = []
        for number in group:
            joined = bool(columns) and number == columns[-1].layer + 1 and layers[number].weights is not None
            if columns:
                x += sizes.strip if joined else sizes.gap
            columns.append(Column(number, labels, x + apart, joined))
            x += apart + sizes.cell
        # Where one line does not fit above a stage, two do.
        right = max(x, left + max(_length(sizes, line) for line in _two_lines(first, unit)))
        stages.append(Stage(columns, left, right, numbered))
        x = right + 3 * sizes.gap
    return Layout(sizes, stages, apart)


def stage_lines(layer: Layer, unit: str, stage: Stage, sizes: Sizes) -> list[str]:
    """What stands above a stage, in one line if it fits: how many channels it has, and how large they are."""
    lines = _two_lines(layer, unit)
    one = " ".join(lines)
    return [one] if _length(sizes, one) <= stage.right - stage.left else lines


def _two_lines(layer: Layer, unit: str) -> list[str]:
    count, height, width = layer.maps.shape
    plus = f" + {layer.leading} token{'s' * (layer.leading > 1)}" if layer.leading else ""
    return [f"{count} {unit}{'s' * (count > 1)}", layer.extent or f"of {height} x {width}{plus}"]


def _length(sizes: Sizes, text: str) -> int:
    return int(font(sizes.text).getlength(text))


def token_side(layout: Layout, tokens: int) -> int:
    """Side of the square that stands for one channel of one token."""
    return _token_side(layout.sizes, tokens)


def _token_side(sizes: Sizes, tokens: int) -> int:
    return min(sizes.cell // tokens, sizes.cell // 4)


def _groups(numbers: Sequence[int], layers: Sequence[Layer]) -> list[list[int]]:
    """The numbers of the layers that are shown, by stages; layers between them that are not shown count."""
    stage_of, stage = [0], 0
    for before, after in itertools.pairwise(layers):
        stage += before.shape != after.shape
        stage_of.append(stage)
    found: dict[int, list[int]] = {}
    for number in numbers:
        found.setdefault(stage_of[number], []).append(number)
    return list(found.values())
