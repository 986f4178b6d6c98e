"""How alike the layers of a network are: distance, cosine and linear CKA between all pairs of layers.

Every function takes `features`, one tensor a layer, `Tensor[N, ...]`, whose row n belongs to input n in all layers, and
returns a matrix over pairs of layers. Distance and cosine compare number with number, so they are defined between
layers of equal shape only (within one stage of a ResNet) and are NaN elsewhere. CKA compares how two layers arrange
the same N inputs, so it is defined between any two layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rdp.errors import ArgumentError

_SMALLEST_BATCH = 4  # the unbiased estimator divides by n - 3


def distance_matrix(features: Sequence[Tensor]) -> Tensor:
    """Euclidean distance between layers: root mean square over inputs of `||x_k(n) - x_l(n)||`.

    What Figure 3 of the paper compares: the 50 x 50 grid points pass through the network, layer k gives the matrix
    `x_k`, `Tensor[2500, H]`, and layers are compared entry by entry, node h with node h and grid point n with grid
    point n. We could not find a normalisation stated; dividing by the square root of N makes the number independent of
    the grid, and equal to how far a typical input is moved.

    Args:
        features: L layers, each `Tensor[N, ...]`.

    Returns:
        `Tensor[L, L]`, float32, in units of the features; exactly 0 for identical layers, NaN for unequal shapes.

    Raises:
        ArgumentError: If there is no layer, the numbers of inputs differ, or a value is NaN or infinite.
    """
    check_features(features)
    result = _undefined(features)
    for index, layers in same_shape(features):
        # pdist subtracts, where cdist may multiply matrices: rounding would then make identical layers differ.
        row, column = torch.triu_indices(len(index), len(index), offset=1)
        pairs = torch.zeros(len(index), len(index))
        pairs[row, column] = pairs[column, row] = torch.pdist(layers).cpu() / len(features[0]) ** 0.5
        result[index[:, None], index] = pairs
    return result


def cosine_matrix(features: Sequence[Tensor], *, centered: bool = False) -> Tensor:
    """Cosine of the angle between layers, each taken as one long vector; what distance shows, without its scale.

    Args:
        features: L layers, each `Tensor[N, ...]`.
        centered: Subtract every feature's mean over the inputs first, so that a constant offset counts for nothing.

    Returns:
        `Tensor[L, L]`, float32, in [-1, 1]; NaN for unequal shapes and for layers that are zero (if `centered`:
        the same for all inputs).

    Raises:
        ArgumentError: As `distance_matrix`.
    """
    check_features(features)
    result = _undefined(features)
    for index, layers in same_shape(features):
        vectors, norm = layers, layers.norm(dim=1)
        if centered:
            rows = layers.reshape(len(layers), len(features[0]), -1)
            vectors = (rows - rows.mean(dim=1, keepdim=True)).flatten(1)
        unit = vectors / _nonzero(vectors.norm(dim=1), norm)[:, None]
        result[index[:, None], index] = (unit @ unit.T).clamp(-1, 1).cpu()
    return result


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of two layers from all inputs at once: `||y^T x||^2 / (||x^T x|| ||y^T y||)` of centred features.

    It does not change when either layer is rotated, scaled or shifted. With few inputs it is biased upwards (two
    unrelated layers wider than N score near 1): `cka_matrix` is not.

    Args:
        x: `Tensor[N, ...]`.
        y: `Tensor[N, ...]`, of any width.

    Returns:
        `Tensor[]` in [0, 1]: 1 for layers equal up to rotation and scale, 0 for orthogonal ones, NaN for constant ones.

    Raises:
        ArgumentError: As `distance_matrix`.

    Source: Kornblith et al. (2019), equation 4 and section 3, https://arxiv.org/abs/1905.00414
    """
    check_features((x, y))
    norms = [layer.flatten(1).float().norm() for layer in (x, y)]
    x, y = (layer.flatten(1).float() - layer.flatten(1).float().mean(dim=0) for layer in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same number from N x N matrices, when those are the smaller ones
        cross, own_x, own_y = ((x @ x.T) * (y @ y.T)).sum(), (x @ x.T).norm(), (y @ y.T).norm()
    else:
        cross, own_x, own_y = (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    own = torch.stack((own_x, own_y)).sqrt()
    return cross / _nonzero(own, torch.stack(norms)).square().prod()


class MinibatchCKA:
    """Linear CKA between all pairs of layers, from minibatches, with an estimator whose expectation has no bias.

    Each minibatch adds an unbiased estimate of HSIC between each pair of layers; CKA is their quotient. Memory is
    O(L n^2) for L layers and minibatches of n inputs, whatever the width of the layers and the number of minibatches.
    Minibatches must be random draws from the inputs, not, say, rows of the grid.

    Source: Nguyen, Raghu and Kornblith (2021), equations 2 and 3, https://arxiv.org/abs/2010.15327, for HSIC_1 of
    Song et al. (2012) on the linear kernel of Kornblith et al. (2019).
    """

    def __init__(self) -> None:
        self._hsic: Tensor | None = None
        self._scale: Tensor | None = None

    def update(self, features: Sequence[Tensor]) -> None:
        """Add one minibatch.

        Args:
            features: L layers, each `Tensor[n, ...]` with n at least 4; L as in the first minibatch.

        Raises:
            ArgumentError: As `distance_matrix`; or if n is less than 4 or the number of layers changed.
        """
        check_features(features)
        if len(features[0]) < _SMALLEST_BATCH:
            raise ArgumentError(
                f"unbiased CKA needs at least {_SMALLEST_BATCH} inputs in a minibatch; got {len(features[0])}"
            )
        hsic, scale = _hsic(features)
        if self._hsic is None or self._scale is None:
            self._hsic, self._scale = torch.zeros_like(hsic), torch.zeros_like(scale)
        if hsic.shape != self._hsic.shape:
            raise ArgumentError(f"the first minibatch had {len(self._hsic)} layers, this one has {len(hsic)}")
        self._hsic += hsic
        self._scale += scale

    def compute(self) -> Tensor:
        """The estimate so far.

        Returns:
            `Tensor[L, L]`, float32: 1 on the diagonal, about 0 for unrelated layers (it can be slightly negative), NaN
            where a layer is constant.

        Raises:
            ArgumentError: If there was no minibatch.
        """
        if self._hsic is None or self._scale is None:
            raise ArgumentError("no minibatch yet; call update(features) at least once before compute()")
        own = _nonzero(self._hsic.diagonal().sqrt(), self._scale.sqrt())
        return (self._hsic / own[:, None] / own).float()


def cka_matrix(features: Sequence[Tensor], *, batch_size: int = 128) -> Tensor:
    """Unbiased linear CKA between all pairs of layers whose features are in memory.

    Args:
        features: L layers, each `Tensor[N, ...]` with N at least 4; shapes may differ.
        batch_size: Largest minibatch for `MinibatchCKA`. Minibatches are the same random draw each time.

    Returns:
        `Tensor[L, L]`, as `MinibatchCKA.compute`.

    Raises:
        ArgumentError: As `MinibatchCKA.update`, or if `batch_size` is less than 4.
    """
    check_features(features)
    if batch_size < _SMALLEST_BATCH:
        raise ArgumentError(f"batch_size must be at least {_SMALLEST_BATCH}; got {batch_size}")
    rows = len(features[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    parts = min(-(-rows // batch_size), max(rows // _SMALLEST_BATCH, 1))  # of equal size, up to one row
    cka = MinibatchCKA()
    for batch in order.tensor_split(parts):
        cka.update([layer[batch.to(layer.device)] for layer in features])
    return cka.compute()


def check_features(features: Sequence[Tensor]) -> None:
    """Raise `ArgumentError` unless there are layers, with equally many inputs each, and all numbers are finite."""
    if len(features) == 0:
        raise ArgumentError("there are no layers to compare: features is empty")
    rows = features[0].shape[:1]
    for layer, values in enumerate(features):
        if values.dim() < 2 or values.shape[:1] != rows or values.numel() == 0:
            raise ArgumentError(
                f"layer {layer} has shape {list(values.shape)}; every layer must be Tensor[N, ...], not empty, with "
                f"the same N inputs as layer 0, {list(features[0].shape)}"
            )
        if not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinite values"
            raise ArgumentError(f"layer {layer} holds {kind}: nothing can be compared with it; has training diverged?")


def same_shape(features: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Layers of equal shape, together: their numbers, `Tensor[G]`, and flat values, `Tensor[G, D]`, float32."""
    shapes = [values.shape for values in features]
    for shape in dict.fromkeys(shapes):
        index = [layer for layer, other in enumerate(shapes) if other == shape]
        yield torch.tensor(index), torch.stack([features[layer].flatten() for layer in index]).float()


def _hsic(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Unbiased HSIC of all pairs of layers, `Tensor[L, L]`, and what the diagonal is compared with to call it zero."""
    n = len(features[0])
    grams, scale = [], []
    for values in features:
        x = values.flatten(1).float()
        scale.append(x.double().square().mean().square() * x.shape[1] ** 2)
        x = x - x.mean(dim=0)  # changes nothing in exact arithmetic, and much in float32
        gram = (x @ x.T).fill_diagonal_(0)
        # Summing products of U-centred matrices is HSIC_1 (Szekely and Rizzo, 2014): one product for all pairs.
        sums = gram.sum(dim=0)
        gram = gram - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        grams.append(gram.fill_diagonal_(0).flatten().cpu())
    centred = torch.stack(grams)
    return (centred @ centred.T).double() / (n * (n - 3)), torch.stack(scale).cpu()


def _nonzero(values: Tensor, scale: Tensor) -> Tensor:
    """NaN where a value is nothing but rounding next to its scale, so that quotients are undefined, not noise."""
    return values.masked_fill(values <= 1e-6 * scale, torch.nan)


def _undefined(features: Sequence[Tensor]) -> Tensor:
    return torch.full((len(features), len(features)), torch.nan)
