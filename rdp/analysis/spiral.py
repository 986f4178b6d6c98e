"""The two-class spiral of section 3.1 of the paper, and the grid on which its pictures are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rdp.errors import ArgumentError


def spiral(samples: int = 16_384, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw points of two spirals that wind once around the origin, inside the unit circle.

    With alpha uniform in [0, 2 pi) and r = alpha / (2 pi), class 0 lies at (r sin alpha, r cos alpha) and class 1 at
    the same spiral rotated by pi. The spirals meet in the origin, so no classifier reaches exactly 100 % for sure.

    Args:
        samples: Number of points; the classes alternate, so they are equally frequent (up to one point).
        seed: Seed of a private generator; the global one is not touched. Another seed gives a test set.

    Returns:
        Points, `Tensor[samples, 2]`, float32, and labels, `Tensor[samples]`, int64, 0 or 1.

    Raises:
        ArgumentError: If `samples` is less than 1.

    Source: section 3.1 of Park (2024), https://arxiv.org/abs/2411.09475
    """
    if samples < 1:
        raise ArgumentError(f"a spiral needs at least 1 sample; got samples={samples}")
    alpha = 2 * math.pi * torch.rand(samples, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(samples) % 2
    radius = alpha / (2 * math.pi) * (1 - 2 * labels)  # rotating by pi is changing the sign
    return torch.stack((radius * alpha.sin(), radius * alpha.cos()), dim=1), labels


def grid(size: int = 50, *, limit: float = 1.0) -> Tensor:
    """The points of a square grid over [-limit, limit]^2, as an image is read: left to right, then downwards.

    Args:
        size: Points a side; 50 in the paper.
        limit: Half the side of the square.

    Returns:
        `Tensor[size * size, 2]`, float32: (x, y) with y falling, so that `maps.reshape(size, size)` is upright.

    Raises:
        ArgumentError: If the grid would be empty: `size` less than 2, or `limit` not positive.
    """
    if size < 2 or not limit > 0:
        raise ArgumentError(f"the grid is empty; it needs size >= 2 and limit > 0, got size={size}, limit={limit}")
    axis = torch.linspace(-limit, limit, size)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), dim=1)
