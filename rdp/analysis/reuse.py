"""A number for the paper's argument: how much of what a layer computes do later layers still carry, in identity form?

The paper's Figures 1 and 3 show features that look alike in distant layers, with different ones in between: they were
not kept by the shortcut but computed again. So similarity between distant layers is not yet reuse, and we split it:

    similarity(k, l)  =  reused(k, l)                               +  recreated(k, l)
    s(k, l)           =  min of s(k, j) over the layers k < j <= l  +  the rest

What layer l shares with layer k is *reused* as far as every layer between them shared it too, and *recreated* where it
was lost on the way. `s` is the cosine of centred features (`cosine_matrix(features, centered=True)`), node with node
and input with input, negative values counted as 0. It must tell identity form from other forms, so it may not be CKA,
which calls a rotated or permuted copy equal; and it must not depend on scale or offset, which the next layer can undo.

The score is the mean of reused(k, l) over all pairs of layers. It is 1 for a network whose layers pass their input on,
near 0 for one in which every layer makes new features, and near 0 too for one that scrambles its features and restores
them later, however often they come back; the mean of recreated(k, l) is what tells the last two apart. It is no measure
of quality: an untrained network with small branches scores high, because it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rdp.analysis.similarity import cosine_matrix, same_shape
from rdp.errors import ArgumentError


class FeatureReuse(NamedTuple):
    """Mean similarity between layers, in its two parts; both in [0, 1], as is their sum."""

    reused: float
    """The feature reuse score: similarity that every layer in between carries."""
    recreated: float
    """Similarity that was lost on the way and came back."""


def feature_reuse(features: Sequence[Tensor]) -> FeatureReuse:
    """Score how much of their features the layers of a network reuse in identity form.

    Args:
        features: L layers in forward order, each `Tensor[N, ...]`, the residual stream's input first (as
            `extract_features` gives them). Layers of different shapes are not compared: in a ResNet the score is over
            pairs within a stage. A constant layer is like no other.

    Returns:
        The `FeatureReuse`, means over all pairs of layers with equal shapes.

    Raises:
        ArgumentError: If no two layers have the same shape, or as `distance_matrix`.
    """
    similarity = cosine_matrix(features, centered=True).nan_to_num(0).clamp(min=0)
    groups = [index for index, _ in same_shape(features) if len(index) > 1]
    if not groups:
        shapes = [list(values.shape) for values in features]
        raise ArgumentError(f"feature reuse compares layers of equal shape, and no two of these are: {shapes}")
    total, reused, pairs = 0.0, 0.0, 0
    for index in groups:
        for position, layer in enumerate(index[:-1]):
            later = similarity[layer, index[position + 1 :]]
            total += later.sum().item()
            reused += later.cummin(dim=0).values.sum().item()
            pairs += len(later)
    return FeatureReuse(reused / pairs, (total - reused) / pairs)
