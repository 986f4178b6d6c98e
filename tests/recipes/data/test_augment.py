"""Augmentation against explicit loops over images, and the randomness under it."""

import math

import numpy as np
import torch
from data.augment import DRAWS, TRIES, central_boxes, crop, flip_, random_boxes, uniforms
from hypothesis import given
from hypothesis import strategies as st

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
    for top, left, h, w in (random_boxes(draws, [height], [width])[0], central_boxes([height], [width], 0.875)[0]):
        assert top >= 0
        assert left >= 0
        assert h >= 1
        assert w >= 1
        assert top + h <= height
        assert left + w <= width


def test_central_box_is_224_of_256():
    assert central_boxes([256, 256], [256, 500], 0.875).tolist() == [[16, 16, 224, 224], [16, 138, 224, 224]]
