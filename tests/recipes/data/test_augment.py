"""Augmentation against explicit loops over images, and the randomness under it."""

import math

import numpy as np
import pytest
import torch
from data.augment import DRAWS, TRIES, central_boxes, central_windows, crop, flip_, random_boxes, uniforms
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

seeds = st.integers(0, 2**32)
epochs = st.integers(0, 10_000)


@given(seeds, epochs, st.lists(st.integers(0, 2**31), min_size=1, max_size=20))
def test_uniforms_of_a_sample_do_not_depend_on_its_batch(seed, epoch, indices):
    together = uniforms(seed, epoch, np.array(indices))
    alone = np.concatenate([uniforms(seed, epoch, np.array([index])) for index in indices])
    assert together.shape == (len(indices), DRAWS)
    assert np.array_equal(together, alone)
    assert ((together >= 0) & (together < 1)).all()


@given(seeds, epochs, st.integers(0, 2**31))
def test_uniforms_of_a_sample_are_a_stream_of_philox(seed, epoch, index):
    stream = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, index, 0, 0]))
    assert np.array_equal(uniforms(seed, epoch, np.array([index]))[0], stream.random(DRAWS))


def test_uniforms_are_uniform_and_unrelated():
    draws = np.stack([uniforms(seed, epoch, np.arange(2000)) for seed in range(2) for epoch in range(2)])
    counts, _ = np.histogram(draws, bins=100, range=(0, 1))
    expected = draws.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 149  # chi-squared, 99 degrees of freedom, p = 0.001
    # Any two streams: seeds, epochs, neighbouring samples, neighbouring draws.
    columns = [draws[0, :, 0], draws[1, :, 0], draws[2, :, 0], draws[0, :, 1], np.roll(draws[0, :, 0], 1)]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4 / math.sqrt(2000)


@given(seeds, epochs, st.integers(1, 9), st.integers(1, 3), st.integers(5, 12))
def test_crop_and_flip_are_those_of_each_image(seed, epoch, samples, channels, side):
    images = torch.randint(0, 256, (samples, channels, side, side), dtype=torch.uint8)
    draws = uniforms(seed, epoch, np.arange(samples))
    got = flip_(crop(images, draws), draws)
    for image, draw, result in zip(images, draws, got, strict=True):
        top, left = (math.floor(draw[column] * 9) - 4 for column in (1, 2))
        expected = torch.zeros_like(image)
        for row in range(side):
            for column in range(side):
                y, x = row + top, column + left
                if 0 <= y < side and 0 <= x < side:
                    expected[:, row, side - 1 - column if draw[0] < 0.5 else column] = image[:, y, x]
        assert torch.equal(result, expected)


@given(seeds, epochs, st.integers(1, 2000), st.integers(1, 2000))
def test_random_box_is_the_first_that_fits(seed, epoch, height, width):
    draws = uniforms(seed, epoch, np.array([7]))
    assert random_boxes(draws, [height], [width])[0].tolist() == explicit_box(draws[0], height, width)


def explicit_box(draw, height, width):
    tries = draw[3:].reshape(4, TRIES).T
    for area_draw, ratio_draw, top_draw, left_draw in tries:
        area = height * width * (0.08 + 0.92 * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * math.log(16 / 9))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return [int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w]
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width * 4 / 3)
    elif width / height > 4 / 3:
        w = round(height * 4 / 3)
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(seeds, epochs, st.integers(1, 500), st.integers(1, 500))
def test_boxes_lie_inside(seed, epoch, height, width):
    draws = uniforms(seed, epoch, np.array([3]))
    for top, left, h, w in (random_boxes(draws, [height], [width])[0], central_boxes([height], [width], 0.875, 224)[0]):
        assert top >= 0
        assert left >= 0
        assert h >= 1
        assert w >= 1
        assert top + h <= height
        assert left + w <= width


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (500, 334), (256, 256), (97, 1000), (30, 20), (1, 1)])
@pytest.mark.parametrize("resolution", [224, 256, 64])
def test_central_window_is_that_of_torchvision(size, resolution):
    """Each pixel of this image is its own place, so that what torchvision's transforms return says where it was."""
    width, height = size
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).double() + 0.5
    transform = v2.Compose([v2.Resize(int(resolution / 0.875), antialias=True), v2.CenterCrop(resolution)])
    shown = transform(places)
    top, left, box_height, box_width = central_windows([height], [width], 0.875, resolution)[0]
    for axis, (start, side) in enumerate([(top, box_height), (left, box_width)]):
        line = shown[axis].mean(1 - axis)
        expected = torch.from_numpy(start + (np.arange(resolution) + 0.5) / resolution * side)
        inside = (expected > 3) & (expected < size[1 - axis] - 3)  # a place at the edge is the mean of fewer
        torch.testing.assert_close(line[inside], expected[inside], atol=0.1, rtol=0)  # of a pixel


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([64, 160, 224, 256]))
def test_central_box_is_the_nearest_of_whole_pixels(height, width, resolution):
    window = central_windows([height], [width], 0.875, resolution)[0]
    box = central_boxes([height], [width], 0.875, resolution)[0]
    for axis, full in enumerate((height, width)):
        start, side = window[axis], window[axis + 2]

        def cost(first, pixels, start=start, side=side):
            return (first + pixels / 2 - start - side / 2) ** 2 + (pixels - side) ** 2 / 12

        near = [
            cost(first, pixels)
            for pixels in range(max(1, int(side) - 2), min(full, int(side) + 3) + 1)
            for first in range(max(0, int(start) - 3), min(full - pixels, int(start) + 3) + 1)
        ]
        assert 0 <= box[axis] <= full - box[axis + 2]
        assert cost(box[axis], box[axis + 2]) <= min(near) + 1e-9


def test_central_box_is_224_of_256():
    assert central_boxes([256, 256], [256, 500], 0.875, 224).tolist() == [[16, 16, 224, 224], [16, 138, 224, 224]]
