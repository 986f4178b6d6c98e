"""Random crops and flips as pure functions of (seed, epoch, sample), computed for a whole batch at a time.

Every sample has a stream of random numbers for each epoch. So neither the loader, nor the number of workers, nor where
a run was resumed changes an image.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

TRIES = 10  # of a random box that fits, before the centre is taken; torchvision's number
DRAWS = 3 + 4 * TRIES  # random numbers that a sample can use: flip, two offsets, boxes


def uniforms(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Random numbers of samples, uniform in [0, 1), `float64[N, DRAWS]`.

    Philox is counter-based: seed and epoch are its key, and each sample begins at a counter of its own.
    """
    philox = np.random.Philox(key=seed + (epoch << 64))
    generator, state = np.random.Generator(philox), philox.state
    draws = np.empty((len(indices), DRAWS))
    for index, row in zip(indices, draws, strict=True):
        state["state"]["counter"][1] = index
        philox.state = state  # much faster than a new generator
        generator.random(out=row)
    return draws


def flip_(images: Tensor, draws: NDArray[np.float64]) -> Tensor:
    """Mirror half of the images left to right, in place.

    Args:
        images: `Tensor[N, C, H, W]`.
        draws: of `uniforms`, for these samples.
    """
    mirrored = torch.from_numpy(np.flatnonzero(draws[:, 0] < 0.5)).to(images.device)
    images[mirrored] = images[mirrored].flip(-1)
    return images


def crop(images: Tensor, draws: NDArray[np.float64], padding: int = 4) -> Tensor:
    """Pad with black and cut each image out again at a random place, the standard augmentation of CIFAR.

    Args:
        images: `Tensor[N, C, H, W]`.
        draws: of `uniforms`, for these samples.
        padding: pixels at each side; 4 since He et al. 2015, section 4.2.
    """
    height, width = images.shape[-2:]
    top, left = torch.from_numpy((draws[:, 1:3] * (2 * padding + 1)).astype(np.int64)).to(images.device).unbind(1)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def random_boxes(
    draws: NDArray[np.float64],
    heights: ArrayLike,
    widths: ArrayLike,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> NDArray[np.int64]:
    """Boxes of a random-resized-crop.

    Args:
        draws: of `uniforms`, for these samples.
        heights: of the images in pixels, `[N]`.
        widths: of the images in pixels, `[N]`.
        scale: range of the box's share of the area.
        ratio: range of its width over its height.

    Returns:
        Top, left, height and width of each box, `int64[N, 4]`.

    Source: Szegedy et al. 2015, section 6; the same rule as torchvision's `RandomResizedCrop`.
    """
    full_h, full_w = np.asarray(heights, np.float64)[:, None], np.asarray(widths, np.float64)[:, None]
    area_draw, ratio_draw, top_draw, left_draw = draws[:, 3:].reshape(len(draws), 4, TRIES).transpose(1, 0, 2)
    area = full_h * full_w * (scale[0] + area_draw * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + ratio_draw * (np.log(ratio[1]) - np.log(ratio[0])))
    height, width = np.round(np.sqrt(area / aspect)), np.round(np.sqrt(area * aspect))
    top, left = np.floor(top_draw * (full_h - height + 1)), np.floor(left_draw * (full_w - width + 1))

    fits = (height > 0) & (height <= full_h) & (width > 0) & (width <= full_w)
    first = fits.argmax(axis=1)
    boxes = np.stack([top, left, height, width], axis=-1)[np.arange(len(draws)), first]

    # No try fits a very long image: its largest central box of an allowed ratio.
    central_h, central_w = (
        np.minimum(full_h, np.round(full_w / ratio[0])),
        np.minimum(full_w, np.round(full_h * ratio[1])),
    )
    central = np.concatenate([(full_h - central_h) // 2, (full_w - central_w) // 2, central_h, central_w], axis=1)
    return np.where(fits.any(axis=1)[:, None], boxes, central).astype(np.int64)


def central_windows(heights: ArrayLike, widths: ArrayLike, share: float, resolution: int) -> NDArray[np.float64]:
    """What torchvision's `Resize(resolution / share)` and `CenterCrop(resolution)` show of each image.

    Args:
        heights: of the images in pixels, `[N]`.
        widths: of the images in pixels, `[N]`.
        share: of the shorter side that is shown.
        resolution: of the result; both steps round in its pixels, which moves the window by up to one of the image's.

    Returns:
        Top, left, height and width of each window in fractions of a pixel, `float64[N, 4]`.
    """
    sides = np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1)
    resized = int(resolution / share) * sides // sides.min(axis=1, keepdims=True)
    scale = sides / resized
    return np.concatenate([np.rint((resized - resolution) / 2) * scale, resolution * scale], axis=1)


def central_boxes(heights: ArrayLike, widths: ArrayLike, share: float, resolution: int) -> NDArray[np.int64]:
    """The whole pixels nearest to the `central_windows`, as `random_boxes` returns boxes.

    A box that is moved moves every pixel, and one that is too wide those at its edges: so the centre counts most.
    """
    full = np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1)[..., None]
    window = central_windows(heights, widths, share, resolution)
    start, side = window[:, :2, None], window[:, 2:, None]
    sides = np.clip(np.rint(side).astype(np.int64) + np.array([0, -1, 1]), 1, full)
    starts = np.clip(np.rint(start + (side - sides) / 2).astype(np.int64), 0, full - sides)
    moved, wider = starts + sides / 2 - (start + side / 2), sides - side
    best = (moved**2 + wider**2 / 12).argmin(axis=-1, keepdims=True)  # the mean square of how far a pixel is moved
    return np.concatenate([np.take_along_axis(each, best, -1)[..., 0] for each in (starts, sides)], axis=1)
