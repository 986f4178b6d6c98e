"""What is in the pictures: positions, colours, contours, lines and points, checked in the pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image as pil
from PIL import ImageColor, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import interpolate

import rdp
from rdp.analysis import Lesion, Lesions, extract_features, grid
from rdp.tensorboard import (
    History,
    Image,
    Layer,
    Panels,
    comparison_panel,
    evenly,
    feature_film,
    feature_panel,
    layer_of,
    lesion_panel,
    node_maps,
    similarity_panel,
    training_panel,
)
from rdp.tensorboard.cells import weight_lines
from rdp.tensorboard.colors import INK, LINES, PAPER, SignedScale, signed_colors
from rdp.tensorboard.layout import Column, Layout, arrange
from rdp.tensorboard.legend import font, short
from rdp.tensorboard.plots import pixels
from rdp.tensorboard.probing import Probing


def random_layers(depth: int, width: int, weights: bool = True) -> list[Layer]:
    maps = torch.randn(depth + 1, width, 50, 50, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) if weights else None
    return [Layer(values, matrix) for values in maps]


def cut(image: Image, layout: Layout, column: Column, row: int) -> Image:
    """A map of a panel, cut out."""
    top, side = layout.top(row), layout.sizes.cell
    return image[top : top + side, column.left : column.left + side]


def layout_of(layers: Sequence[Layer], *, probe: bool = False, shown: int | None = None, unit: str = "node") -> Layout:
    return arrange(layers, shown, shown, unit, probe)


def expected_cell(maps: Tensor, side: int, scale: SignedScale) -> Image:
    """A map in its colours, by hand: pixels of small maps as they are, large ones interpolated."""
    mode = "nearest-exact" if min(maps.shape) < 32 else "bilinear"
    return signed_colors(scale.positions(interpolate(maps[None, None], (side, side), mode=mode)[0, 0].numpy()))


def scale_of(layers: Sequence[Layer], layout: Layout) -> SignedScale:
    shown = [layers[column.layer].maps[column.channels].flatten() for column in layout.columns]
    return SignedScale.of(torch.cat(shown).numpy())


def test_the_whole_panel_has_every_node_of_every_layer_in_its_place() -> None:
    layers = random_layers(9, 9)
    image, layout = feature_panel(layers, max_layers=None, max_nodes=None), layout_of(layers)
    scale = scale_of(layers, layout)
    assert [column.layer for column in layout.columns] == list(range(10))
    assert all(column.channels == list(range(9)) for column in layout.columns)
    for row in range(9):
        for column in layout.columns:
            expected = expected_cell(layers[column.layer].maps[row], layout.sizes.cell, scale)
            np.testing.assert_array_equal(cut(image, layout, column, row), expected)


class Stages(nn.Module):
    """Two blocks of each width; the first of each but one has a projection for its shortcut."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 1)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(before, after, 2, 2) for before, after in pairs[1:])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2, 1), nn.ReLU(), nn.Conv2d(2, width, 1)) for width in widths for _ in "12"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number and number % 2 == 0:
                x = self.downs[number // 2 - 1](x)
            x = x + block(x)
        return x


class Tokens(nn.Module):
    """Patches of 4 x 4 pixels after two tokens of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.own = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 2, width))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.own.expand(len(x), -1, -1), self.patches(x).flatten(2).mT), dim=1)
        for block in self.blocks:
            x = x + block(x)
        return x


class Text(nn.Module):
    """An embedding and blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def read_number(image: Image, right: int, middle: int, size: int, below: int) -> int:
    """The number that stands left of a place, found by writing all numbers."""
    box = (4 * size, 2 * size)
    seen = image[middle - size : middle + size, right - 4 * size : right]
    for number in range(below):
        written = pil.new("RGB", box, PAPER)
        ImageDraw.Draw(written).text((box[0], size), str(number), INK, font(size), "rm")
        if (np.asarray(written)[:, 2 * size :] == seen[:, 2 * size :]).all():
            return number
    raise AssertionError("no number stands there")


@pytest.mark.parametrize(
    ("model", "inputs", "widths"),
    [
        (Stages(64, 128, 256, 512), torch.randn(4, 3, 16, 16), [64] * 3 + [128] * 2 + [256] * 2 + [512] * 2),
        (Stages(24, 24, 40), torch.randn(4, 3, 8, 8), [24] * 3 + [24] * 2 + [40] * 2),
        (Tokens(48), torch.randn(4, 3, 24, 24), [48] * 4),
        (Text(48), torch.randint(50, (4, 11)), [48] * 4),
    ],
)
def test_each_cell_is_labelled_with_its_own_channel(model: nn.Module, inputs: Tensor, widths: list[int]) -> None:
    handle = rdp.attach(model, example_inputs=inputs, verify=False)
    with Panels(handle, inputs, lambda *_: None) as panels:
        image = panels.draw(0)["features/nodes"]
    features = list(extract_features(handle, inputs).values())
    layers = Probing(handle, inputs, None, None).layers(features)
    layout = arrange(layers, 8, 6, "channel", True)
    scale, sizes = scale_of(layers, layout), layout.sizes
    assert [column.layer for column in layout.columns] == list(range(len(widths)))
    assert [column.layer for stage in layout.stages for column in stage.columns[:1]] == [
        number for number, values in enumerate(features) if not number or values.shape != features[number - 1].shape
    ]
    for stage in layout.stages:
        for row in range(6):
            right = stage.numbered
            width = widths[stage.columns[0].layer]
            channel = read_number(image, right, layout.top(row) + sizes.cell // 2, sizes.text, width)
            for column in stage.columns:
                values = features[column.layer][0]
                if values.dim() == 3:
                    own = values[channel]
                elif inputs.dim() == 4:  # after the tokens, an image
                    own = values[2:, channel].reshape(6, 6)
                else:
                    own = torch.cat((values[:, channel], torch.zeros(1))).reshape(3, 4)
                shown = cut(image, layout, column, row)
                expected = expected_cell(own, sizes.cell, scale)
                if inputs.dim() == 2:  # of 12 places the last is none
                    assert (shown[-40:, -40:] == 208).all()
                    shown, expected = shown[:100], expected[:100]
                np.testing.assert_array_equal(shown, expected)
                if inputs.dim() == 4 and values.dim() == 2:
                    side = sizes.cell // 4
                    for token in range(2):
                        at = image[layout.top(row) + token * side + side // 2, column.left - layout.apart + side // 2]
                        color = signed_colors(scale.positions(values[token, channel].numpy()))
                        np.testing.assert_array_equal(at, color)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["", "stem", "shortcut", "embedding", "a long name of it"]),
    st.sampled_from(["node", "channel"]),
    st.lists(st.tuples(st.sampled_from([1, 3, 64, 2048]), st.integers(0, 2), st.booleans()), min_size=1, max_size=3),
)
def test_no_words_of_a_feature_panel_lie_over_others(name: str, unit: str, stages: list[tuple[int, int, bool]]) -> None:
    drawn: dict[ImageDraw.ImageDraw, list[tuple[float, float, float, float]]] = {}

    def write(
        self: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, fill: str, font: Any, anchor: str = "la"
    ) -> None:
        drawn.setdefault(self, []).append(self.textbbox(xy, text, font, anchor))

    layers = [
        Layer(torch.randn(width, 4, 4), tokens=torch.randn(width, leading) if leading else None)
        for width, leading, twice in stages
        for _ in range(2 + twice)
    ]
    layers[0] = replace(layers[0], name=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", write)
        image = feature_panel(layers, unit=unit)
    assert len(drawn) >= 3  # title, panel, legend
    for boxes in drawn.values():
        for one, other in itertools.combinations(boxes, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert all(0 <= left < right <= image.shape[1] for left, _, right, _ in boxes)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1))
        self.down = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.f(x)


def test_what_enters_is_named_for_what_it_is() -> None:
    def name(model: nn.Module, inputs: Tensor) -> str:
        handle = rdp.attach(model, example_inputs=inputs, verify=False)
        return Probing(handle, inputs, None, None).enters(list(extract_features(handle, inputs).values()))

    assert name(Stages(4, 8), torch.randn(4, 3, 4, 4)) == "stem"
    assert name(Text(8), torch.randint(50, (4, 9))) == "embedding"
    assert name(Bare(), torch.randn(4, 3, 4, 4)) == "input"
    assert name(Projected(), torch.randn(4, 3, 4, 4)) == "shortcut"


def test_the_same_value_has_the_same_color_in_all_maps() -> None:
    maps = torch.ones(3, 2, 50, 50)
    maps[1] *= -1
    maps[2] *= 0.5
    layers = [Layer(values) for values in maps]
    image, layout = feature_panel(layers), layout_of(layers)
    colors = [
        np.unique(np.concatenate([cut(image, layout, column, row) for row in range(2)]).reshape(-1, 3), axis=0)
        for column in layout.columns
    ]
    assert [len(color) for color in colors] == [1, 1, 1]
    orange, blue = colors[1][0].astype(int), colors[0][0].astype(int)
    assert orange[0] > orange[2]
    assert blue[2] > blue[0]
    assert colors[2][0].sum() > colors[0][0].sum()  # half the value is paler


def test_a_film_has_one_scale() -> None:
    small, large = ([Layer(values * factor) for values in torch.ones(3, 2, 50, 50)] for factor in (1.0, 10.0))
    film, layout = feature_film({"epoch 0": small, "epoch 9": large}), layout_of(small)
    above, below = film[: layout.top(2)], film[layout.top(2) :]
    pale, dark = (cut(part, layout, layout.columns[1], 0)[5, 5].astype(int) for part in (above, below))
    assert pale.sum() > dark.sum()
    own = cut(feature_panel(small), layout, layout.columns[1], 0)[5, 5]
    assert own.sum() < pale.sum()  # by itself the first moment has a scale of its own


def test_the_contour_is_where_features_are_zero() -> None:
    x = grid(50)[:, 0].reshape(1, 50, 50)
    points, labels = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]), torch.tensor([0, 1])
    layers = [Layer(x), Layer(x.mT.contiguous()), Layer(x)]
    image, layout = feature_panel(layers, points=points, labels=labels), layout_of(layers, probe=True)
    shown = [cut(image, layout, column, 0) for column in layout.columns]
    dark = [(cell == INK).all(axis=-1) for cell in shown]
    assert set(np.flatnonzero(dark[0].any(axis=0))) <= set(range(82, 88))  # a vertical line in the middle of 168 pixels
    assert set(np.flatnonzero(dark[1].any(axis=1))) <= set(range(82, 88))
    # Over the last layer, class 0 up and right as ink with a rim of paper, class 1 down and left the other way round.
    for row, column, center, rim in ((42, 125, INK, PAPER), (125, 42, PAPER, INK)):
        assert (shown[2][row, column] == center).all()
        assert (shown[2][row, column + layout.sizes.dot] == rim).all()
    assert not dark[0][:60, 100:].any()


def test_weight_lines_join_the_nodes_and_show_sign_and_magnitude() -> None:
    weights = torch.zeros(3, 3)
    weights[0, 2], weights[2, 0] = 2.0, -1.0
    layers = [Layer(torch.ones(3, 50, 50)), Layer(torch.ones(3, 50, 50), weights)]
    image, layout = feature_panel(layers), layout_of(layers)
    sizes, left = layout.sizes, layout.columns[0].left + layout.sizes.cell
    strip = image[sizes.header : sizes.header + 3 * sizes.pitch, left : left + sizes.strip].astype(int)
    blue, orange = strip[..., 2] - strip[..., 0] > 60, strip[..., 0] - strip[..., 2] > 60
    # To node 0 from node 2: from below on the left to above on the right; and the other way round.
    middle = [sizes.cell // 2 + row * sizes.pitch for row in range(3)]
    for mask, start, end in ((blue, 2, 0), (orange, 0, 2)):
        assert abs(np.flatnonzero(mask[:, 4]).mean() - middle[start]) < 24
        assert abs(np.flatnonzero(mask[:, -5]).mean() - middle[end]) < 24
    assert blue[:, 10].sum() > 1.5 * orange[:, 10].sum()  # twice the weight, twice the width


def test_weights_lead_from_the_layer_before_or_are_not_drawn() -> None:
    layers = random_layers(9, 3)
    layout = arrange(layers, 3, None, "node", probe=False)
    assert [(column.layer, column.joined) for column in layout.columns] == [
        (0, False), (1, True), (5, False), (9, False),
    ]  # fmt: skip


def test_few_enough_weights_are_drawn_to_be_told_apart() -> None:
    rows = 32
    lines = weight_lines(torch.rand(rows, rows).numpy(), layout_of(random_layers(1, rows)))
    assert (lines[:, lines.shape[1] // 2] != 255).any(axis=1).mean() < 0.5


def test_zero_weights_and_zero_features_can_be_drawn() -> None:
    layers = [Layer(torch.zeros(2, 50, 50)), Layer(torch.zeros(2, 50, 50), torch.zeros(2, 2))]
    assert feature_panel(layers).std() > 0


@given(st.integers(1, 300), st.integers(1, 300))
def test_large_networks_are_sampled_evenly(total: int, at_most: int) -> None:
    indices = evenly(total, at_most)
    assert len(indices) == min(total, at_most)
    assert indices[0] == 0
    assert indices == sorted(set(indices))
    steps = [b - a for a, b in itertools.pairwise(indices)]
    assert not steps or (max(steps) - min(steps) <= 1 and indices[-1] == total - 1)
    assert evenly(total, None) == list(range(total))


def test_the_whole_32_x_65_picture_and_the_sample_are_to_be_had() -> None:
    layers = random_layers(32, 32)
    whole = feature_panel(layers, max_layers=None, max_nodes=None)
    assert whole.shape[1] >= 33 * 80 + 32 * 76
    assert whole.shape[0] >= 32 * 80
    assert feature_panel(layers).shape[1] < 2600


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), st.floats(-1e6, 1e6, width=32))
def test_the_scale_is_odd_monotone_and_invertible(values: list[float], value: float) -> None:
    scale = SignedScale.of(np.array(values))
    at = scale.positions(np.float32([value, -value, value + 1]))
    assert at[0] == -at[1]
    assert at[2] >= at[0]
    assert abs(at).max() <= 1
    if abs(value) < scale.limit:
        assert scale.value(float(at[0])) == pytest.approx(value, rel=1e-2, abs=1e-2 * scale.linear)


def test_maps_of_image_models() -> None:
    channels_first = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    assert torch.equal(node_maps(channels_first), channels_first[0])
    assert torch.equal(node_maps(channels_first.permute(0, 2, 3, 1)), channels_first[0])
    tokens = torch.cat((torch.full((2, 1, 3), -1.0), channels_first.flatten(2).mT), dim=1)  # a class token first
    assert torch.equal(node_maps(tokens), channels_first[0])
    assert torch.equal(layer_of(tokens).maps, channels_first[0])
    assert layer_of(tokens).tokens.tolist() == [[-1.0]] * 3
    wide = torch.randn(2, 4, 6, 3)  # shapes do not tell which axis has the channels
    assert torch.equal(layer_of(wide, width=3).maps, wide[0].permute(2, 0, 1))
    points = torch.arange(12.0).reshape(4, 3)
    assert node_maps(points, grid_size=2)[1].tolist() == [[1, 4], [7, 10]]


@pytest.mark.parametrize(
    ("values", "grid_size"), [(torch.ones(9, 3), None), (torch.ones(9, 3), 4), (torch.ones(2, 15, 3), None)]
)
def test_features_without_a_map_are_refused(values: Tensor, grid_size: int | None) -> None:
    with pytest.raises(rdp.ArgumentError, match="cannot be drawn as maps"):
        node_maps(values, grid_size)


BAD = torch.ones(2, 50, 50)
BAD[0, 3, 3] = torch.nan


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: feature_panel([]), "input and at least one layer; got 0"),
        (lambda: feature_panel([Layer(torch.ones(2, 50, 50)), Layer(BAD)]), "layer 1 holds NaN"),
        (lambda: feature_panel([Layer(torch.ones(2, 0, 0))] * 2), r"not empty; got shape \[2, 0, 0\]"),
        (lambda: feature_panel([Layer(torch.ones(4, 4))] * 2), r"Tensor\[H, h, w\]"),
        (lambda: feature_panel(random_layers(2, 2), max_nodes=0), "at least 1 layer and 1 node"),
        (lambda: similarity_panel([torch.ones(8, 2), BAD.flatten(1)[:, :2]]), "same N inputs"),
        (lambda: similarity_panel([BAD.mT.flatten(1).T]), "NaN"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Callable[[], Image], message: str) -> None:
    with pytest.raises(rdp.ArgumentError, match=message):
        draw()


@settings(max_examples=3)
@given(st.integers(2, 40))
def test_charts_are_drawn_at_the_promised_size(layers: int) -> None:
    features = [torch.randn(20, 3 + (layer > 20)) for layer in range(layers)]
    assert similarity_panel(features).shape == (1240, 1400, 3)
    curves = {"a": torch.rand(3, layers), "b": torch.rand(1, layers)}
    assert comparison_panel(curves, curves).shape == (720, 1400, 3)
    learning = {rdp.Phase.FREEZE: [(0.1, 0.1)] * layers, rdp.Phase.DROP: [(1.0, 1.0)] + [(0.9, 0.9)] * (layers - 1)}
    history = History({"train/loss": [(0, 1.0), (9, 0.5)], "drop/loss": [(0, 1.0)], "rdp/rate": [(0, 0.1)]})
    empty, full = training_panel({}, History()), training_panel(learning, history)
    assert empty.shape == full.shape == (1740, 1400, 3)
    assert (empty != full).any()


def test_numbers_are_short() -> None:
    assert [short(v) for v in (0, 0.00001, 0.25, -12.3, 118.4, 2345.0, 3e7)] == [
        "0",
        "1e-05",
        "0.25",
        "-12",
        "118",
        "2.3k",
        "3e+07",
    ]


def lesioned(worth: tuple[float, ...]) -> Lesions:
    table = tuple(Lesion(f"branch {i}", 1 - value, value) for i, value in enumerate(worth))
    curve = {number: 1 - number / len(worth) for number in range(len(worth) + 1)}
    return Lesions(1.0, True, table, curve, {number: (value, value) for number, value in curve.items()})


def bars(image: Image, color: str) -> list[int]:
    """Heights in pixels of the bars of a colour, in the left half, by columns that differ."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    heights = (image[:, :660] == rgb).all(axis=2).sum(axis=0)
    return [height for height, _ in itertools.groupby(heights[heights > 16].tolist())]


def test_bars_of_lesions_are_as_high_as_branches_are_worth() -> None:
    heights = bars(lesion_panel(lesioned((0.1, 0.4, 0.2))), LINES[0])
    assert len(heights) == 3
    assert heights == pytest.approx([max(heights) / 4, max(heights), max(heights) / 2], abs=4)


def test_lesions_of_several_ways_of_training_stand_side_by_side() -> None:
    runs = {"standard": [lesioned((0.2, 0.4)), lesioned((0.4, 0.2))], "rdp": lesioned((0.1, 0.1))}
    image = lesion_panel(runs, title="which?", metric="accuracy")
    assert image.shape == (720, 1400, 3)
    assert len(set(bars(image, LINES[0]))) == 1  # means over runs
    legend = image[:200, 700:].reshape(-1, 3).astype(int)  # above the curves
    for color in LINES[:2]:
        assert (abs(legend - ImageColor.getrgb(color)).sum(axis=1) < 20).any()
    assert max(bars(image, LINES[1])) == pytest.approx(max(bars(image, LINES[0])) / 3, abs=4)


@pytest.mark.parametrize(("first", "last"), [(2.3, 2e-5), (2.3, 0.3), (1.9, 1.1), (3e5, 1.2e5), (-3.0, 5.0)])
def test_every_number_of_a_training_panel_is_whole(first: float, last: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("rdp.tensorboard.training.pixels", lambda made: drawn.append(made) or pixels(made))
    history = History()
    for step, value in enumerate(np.linspace(first, last, 50)):
        history.add(20_000 * step, {"train/loss": value, "train/gradient_norm": value, "test/top1": 100 * value})
    training_panel({}, history)
    (made,) = drawn
    for axes in made.axes:
        low, high = axes.get_ylim()
        labels = [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
        assert sum(bool(label.get_text()) for label in labels) >= 2 or not axes.lines
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert all(box.x0 >= 0 and box.x1 <= made.bbox.x1 for box in boxes)


@pytest.mark.parametrize("points", [1, 2, 40])
def test_steps_below_a_training_panel_are_whole_numbers(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("rdp.tensorboard.training.pixels", lambda made: drawn.append(made) or pixels(made))
    history = History()
    for step in range(1, 1 + points):
        history.add(step, {"train/loss": 2.0 / step, "train/gradient_norm": 1.0 / step, "test/top1": 9.0})
    training_panel({}, history)
    (made,) = drawn
    steps = [axes for axes in made.axes if axes.get_xlabel() == "step" and axes.lines]
    assert len(steps) >= 3
    for axes in steps:
        low, high = axes.get_xlim()
        ticks = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert ticks
        assert all(text.isdecimal() for text in ticks)
