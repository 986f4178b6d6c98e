"""What is in the pictures: positions, colours, contours, lines and points, checked in the pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rdp
from rdp.analysis import Lesion, Lesions, grid
from rdp.tensorboard import (
    History,
    Image,
    Layer,
    comparison_panel,
    evenly,
    feature_panel,
    lesion_panel,
    node_maps,
    similarity_panel,
    training_panel,
)
from rdp.tensorboard.colors import INK, LINES, PAPER, SignedScale, signed_colors
from rdp.tensorboard.feature_panel import _LARGE, _SMALL
from rdp.tensorboard.legend import short


def random_layers(depth: int, width: int, weights: bool = True) -> list[Layer]:
    maps = torch.randn(depth + 1, width, 50, 50, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) if weights else None
    return [Layer(values, matrix) for values in maps]


def cells(image: Image, rows: int, columns: int, small: bool, margin: int, strip: bool) -> np.ndarray:
    """The maps of a panel, cut out: `[rows, columns, cell, cell, 3]`."""
    sizes = _SMALL if small else _LARGE
    step = sizes.cell + (sizes.strip if strip else sizes.gap)
    cut = [
        [
            image[
                sizes.header + row * sizes.pitch : sizes.header + row * sizes.pitch + sizes.cell,
                margin + column * step : margin + column * step + sizes.cell,
            ]
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    return np.array(cut)


def margin_of(image: Image, small: bool = False) -> int:
    """The left edge of the first map: the first grey frame from the left."""
    sizes = _SMALL if small else _LARGE
    row = image[sizes.header + sizes.cell // 2]
    return int(np.flatnonzero((row == 190).all(axis=1))[0]) + 1


def test_the_whole_panel_has_every_node_of_every_layer_in_its_place() -> None:
    layers = random_layers(9, 9)
    image = feature_panel(layers, max_layers=None, max_nodes=None)
    shown = cells(image, 9, 10, small=True, margin=margin_of(image, small=True), strip=True)
    scale = SignedScale.of(np.concatenate([layer.maps.numpy().ravel() for layer in layers]))
    for row in range(9):
        for column in range(10):
            expected = signed_colors(scale.positions(layers[column].maps[row].numpy()))
            np.testing.assert_array_equal(shown[row, column], expected)


def test_the_same_value_has_the_same_color_in_all_maps() -> None:
    maps = torch.ones(3, 2, 50, 50)
    maps[1] *= -1
    maps[2] *= 0.5
    image = feature_panel([Layer(values) for values in maps])
    shown = cells(image, 2, 3, small=False, margin=margin_of(image), strip=False)
    colors = [np.unique(shown[:, column].reshape(-1, 3), axis=0) for column in range(3)]
    assert [len(color) for color in colors] == [1, 1, 1]
    orange, blue = colors[1][0].astype(int), colors[0][0].astype(int)
    assert orange[0] > orange[2]
    assert blue[2] > blue[0]
    assert colors[2][0].sum() > colors[0][0].sum()  # half the value is paler


def test_the_contour_is_where_features_are_zero() -> None:
    x = grid(50)[:, 0].reshape(1, 50, 50)
    points, labels = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]), torch.tensor([0, 1])
    layers = [Layer(x), Layer(x.mT.contiguous()), Layer(x)]
    image = feature_panel(layers, points=points, labels=labels)
    shown = cells(image, 1, 3, small=False, margin=margin_of(image), strip=False)[0]
    dark = (shown == INK).all(axis=-1)
    assert set(np.flatnonzero(dark[0].any(axis=0))) == {42, 43}  # a vertical line in the middle of 84 pixels
    assert set(np.flatnonzero(dark[1].any(axis=1))) == {42, 43}
    # Over the last layer, class 0 up and right as ink, class 1 down and left as paper with a rim of ink.
    assert (shown[2][21, 62] == INK).all()
    assert (shown[2][62, 21] == PAPER).all()
    assert (shown[2][61, 20] == INK).all()
    assert not dark[0][:30, 50:].any()


def test_weight_lines_join_the_nodes_and_show_sign_and_magnitude() -> None:
    weights = torch.zeros(3, 3)
    weights[0, 2], weights[2, 0] = 2.0, -1.0
    layers = [Layer(torch.zeros(3, 50, 50)), Layer(torch.zeros(3, 50, 50), weights)]
    image = feature_panel(layers)
    left = margin_of(image) + _LARGE.cell
    strip = image[_LARGE.header : _LARGE.header + 3 * _LARGE.pitch, left : left + _LARGE.strip].astype(int)
    blue, orange = strip[..., 2] - strip[..., 0] > 60, strip[..., 0] - strip[..., 2] > 60
    # To node 0 from node 2: from below on the left to above on the right; and the other way round.
    middle = [_LARGE.cell // 2 + row * _LARGE.pitch for row in range(3)]
    for mask, start, end in ((blue, 2, 0), (orange, 0, 2)):
        assert abs(np.flatnonzero(mask[:, 2]).mean() - middle[start]) < 12
        assert abs(np.flatnonzero(mask[:, -3]).mean() - middle[end]) < 12
    assert blue[:, 5].sum() > 1.5 * orange[:, 5].sum()  # twice the weight, twice the width


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
    assert whole.shape[1] >= 33 * 50 + 32 * 46
    assert whole.shape[0] >= 32 * 50
    assert feature_panel(layers).shape[1] < 1200


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


@settings(max_examples=5)
@given(st.integers(2, 40))
def test_charts_are_drawn_at_the_promised_size(layers: int) -> None:
    features = [torch.randn(20, 3 + (layer > 20)) for layer in range(layers)]
    assert similarity_panel(features).shape == (580, 700, 3)
    curves = {"a": torch.rand(3, layers), "b": torch.rand(1, layers)}
    assert comparison_panel(curves, curves).shape == (340, 700, 3)
    empty = training_panel([0.0] * layers, [0.0] * layers, History())
    full = training_panel(
        [0.1] * layers,
        [0.5] * layers,
        History({"DROP": [(0, 1.0)]}, {"DROP": [(0, 5)]}, {}, {"loss": [(0, 1.0), (9, 0.5)]}),
    )
    assert empty.shape == full.shape == (580, 700, 3)
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
    heights = (image[:, :330] == rgb).all(axis=2).sum(axis=0)
    return [height for height, _ in itertools.groupby(heights[heights > 8].tolist())]


def test_bars_of_lesions_are_as_high_as_branches_are_worth() -> None:
    heights = bars(lesion_panel(lesioned((0.1, 0.4, 0.2))), LINES[0])
    assert len(heights) == 3
    assert heights == pytest.approx([max(heights) / 4, max(heights), max(heights) / 2], abs=2)


def test_lesions_of_several_ways_of_training_stand_side_by_side() -> None:
    runs = {"standard": [lesioned((0.2, 0.4)), lesioned((0.4, 0.2))], "rdp": lesioned((0.1, 0.1))}
    image = lesion_panel(runs, title="which?", metric="accuracy")
    assert image.shape == (340, 700, 3)
    assert len(set(bars(image, LINES[0]))) == 1  # means over runs
    assert max(bars(image, LINES[1])) == pytest.approx(max(bars(image, LINES[0])) / 3, abs=2)
