"""Distance, cosine and CKA against closed forms and against the definitions, written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import rdp
from rdp.analysis import MinibatchCKA, cka_matrix, cosine_matrix, distance_matrix, linear_cka

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(8, 40)
widths = st.integers(1, 6)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed: int, width: int) -> Tensor:
    return torch.linalg.qr(draw(seed, width, width))[0]


def hsic_1(x: Tensor, y: Tensor) -> float:
    """Song et al. (2012), equation 5, as it is printed in equation 3 of Nguyen et al. (2021)."""
    n = len(x)
    k, l = (z.double() @ z.double().T for z in (x, y))  # noqa: E741
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    one = torch.ones(n, dtype=torch.double)
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return float((k @ l).trace() + sums - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@given(seeds, rows, widths)
def test_identical_layers_have_distance_0_and_similarity_1(seed: int, n: int, width: int) -> None:
    x = draw(seed, n, width)
    assert distance_matrix([x, x.clone()]).count_nonzero() == 0
    torch.testing.assert_close(cosine_matrix([x, x.clone()]), torch.ones(2, 2))
    torch.testing.assert_close(cka_matrix([x, x.clone()]), torch.ones(2, 2))
    torch.testing.assert_close(linear_cka(x, x), torch.tensor(1.0))


@given(seeds, rows, widths, st.floats(-3, 3))
def test_distance_is_how_far_a_typical_input_moves(seed: int, n: int, width: int, shift: float) -> None:
    x = draw(seed, n, width)
    expected = abs(shift) * math.sqrt(width)
    assert distance_matrix([x, x + shift])[0, 1].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(seeds, st.integers(2, 5))
def test_distance_is_a_metric(seed: int, layers: int) -> None:
    d = distance_matrix(draw(seed, layers, 9, 3).unbind())
    assert torch.equal(d, d.T)
    assert d.diagonal().count_nonzero() == 0
    assert (d[:, None, :] <= d[:, :, None] + d[None, :, :] + 1e-5).all()  # d(i, k) <= d(i, j) + d(j, k)


@given(seeds, st.floats(0.1, 10), st.floats(-1, 1))
def test_cosine_is_blind_to_scale_and_centred_cosine_to_offset(seed: int, scale: float, offset: float) -> None:
    x, y = draw(seed, 2, 12, 4).unbind()
    torch.testing.assert_close(cosine_matrix([x, -scale * x])[0, 1], torch.tensor(-1.0))
    moved = cosine_matrix([x, y + offset], centered=True)
    torch.testing.assert_close(moved, cosine_matrix([x, y], centered=True), rtol=1e-4, atol=1e-5)


@given(seeds, seeds, rows, widths, st.floats(0.01, 100), st.floats(-10, 10))
def test_cka_is_blind_to_rotation_scale_and_offset(
    seed: int, other: int, n: int, width: int, scale: float, offset: float
) -> None:
    x, y = draw(seed, n, width), draw(other, n, 3)
    # Of few inputs the unbiased estimate may be next to nothing, and a quotient of two such is rounding; so is a small
    # layer on a large offset, which float32 does not resolve.
    assume(min(hsic_1(x, x), hsic_1(y, y)) > 1e-3)
    turned = scale * (x @ rotation(seed ^ 1, width) + offset)
    assert cka_matrix([x, turned])[0, 1].item() == pytest.approx(1, abs=1e-3)
    assert linear_cka(x, turned).item() == pytest.approx(1, abs=1e-3)
    assert cka_matrix([turned, y])[0, 1].item() == pytest.approx(cka_matrix([x, y])[0, 1].item(), abs=1e-3)
    assert linear_cka(turned, y).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-3)


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(9, 30))
def test_orthogonal_layers_have_cka_0(seed: int, first: int, second: int, n: int) -> None:
    columns = draw(seed, n, first + second)
    basis = torch.linalg.qr(columns - columns.mean(dim=0))[0]  # centred and orthogonal
    assert linear_cka(basis[:, :first], basis[:, first:]).item() == pytest.approx(0, abs=1e-6)
    assert cosine_matrix([basis[:, :1], basis[:, first : first + 1]])[0, 1].item() == pytest.approx(0, abs=1e-6)


@given(seeds, st.integers(1, 3), st.integers(1, 3))
def test_unbiased_cka_of_unrelated_layers_is_0_on_average(seed: int, first: int, second: int) -> None:
    """Pairing the inputs of one layer with those of the other in all 5! ways makes the layers independent."""
    x, y = draw(seed, 5, first), draw(seed ^ 1, 5, second)
    hsic = [hsic_of(x, y[list(order)]) for order in itertools.permutations(range(5))]
    assert sum(hsic) / len(hsic) == pytest.approx(0, abs=1e-5 * max(map(abs, hsic)))
    biased = [linear_cka(x, y[list(order)]).item() for order in itertools.permutations(range(5))]
    assert sum(biased) / len(biased) > 0.05


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_minibatches_estimate_without_bias(seed: int, first: int, second: int) -> None:
    """Over all minibatches of 5 of 8 inputs the mean of the estimate is the estimate from all 8."""
    x, y = draw(seed, 8, first), draw(seed ^ 1, 8, second)
    batches = [list(batch) for batch in itertools.combinations(range(8), 5)]
    mean = sum(hsic_of(x[batch], y[batch]) for batch in batches) / len(batches)
    assert mean == pytest.approx(hsic_1(x, y), rel=1e-3, abs=1e-4)


def hsic_of(x: Tensor, y: Tensor) -> float:
    """What one minibatch adds to the estimate: its own HSIC, from the library."""
    cka = MinibatchCKA()
    cka.update([x, y])
    own = [hsic_1(z, z) for z in (x, y)]
    return cka.compute()[0, 1].item() * math.sqrt(own[0] * own[1])


@given(seeds, st.integers(4, 30), widths, widths)
def test_one_minibatch_is_the_printed_formula(seed: int, n: int, first: int, second: int) -> None:
    x, y = draw(seed, n, first) + 3, draw(seed ^ 1, n, second)
    own = hsic_1(x, x) * hsic_1(y, y)
    assume(min(hsic_1(x, x), hsic_1(y, y)) > 1e-3)
    expected = hsic_1(x, y) / math.sqrt(own)
    assert cka_matrix([x, y])[0, 1].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(seeds)
def test_the_estimate_approaches_the_value_from_all_inputs(seed: int) -> None:
    x = draw(seed, 3000, 3)
    y = x @ draw(seed ^ 1, 3, 4) + draw(seed ^ 2, 3000, 4)
    assert cka_matrix([x, y])[0, 1].item() == pytest.approx(linear_cka(x, y).item(), abs=0.02)


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_cka_from_gram_matrices_is_cka_from_features(seed: int, first: int, second: int) -> None:
    x, y = draw(seed, 8, first).double(), draw(seed ^ 1, 8, second).double()
    x0, y0 = x - x.mean(dim=0), y - y.mean(dim=0)
    expected = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    assert linear_cka(x, y).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@given(seeds)
def test_layers_of_other_shapes_are_compared_by_cka_alone(seed: int) -> None:
    features = [draw(seed, 12, 3, 4, 4), draw(seed ^ 1, 12, 3, 4, 4), draw(seed ^ 2, 12, 6, 2, 2)]
    for matrix in (distance_matrix(features), cosine_matrix(features)):
        assert matrix.isnan().tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    assert cka_matrix(features).isfinite().all()


def test_a_constant_layer_is_not_comparable_rather_than_noise() -> None:
    x, constant = draw(0, 50, 3), torch.full((50, 3), 1e4) + 1e-3 * draw(1, 50, 3).round()
    for value in (cka_matrix([x, constant])[0, 1], linear_cka(x, constant)):
        assert value.isnan()
    assert cosine_matrix([x, constant], centered=True)[0, 1].isnan()
    assert cosine_matrix([x, torch.zeros(50, 3)])[0, 1].isnan()
    assert distance_matrix([x, constant]).isfinite().all()


@pytest.mark.parametrize("compare", [distance_matrix, cosine_matrix, cka_matrix])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "there are no layers"),
        ([torch.ones(0, 3)], r"layer 0 has shape \[0, 3\]; .* not empty"),
        ([torch.ones(5, 3), torch.ones(6, 3)], r"layer 1 has shape \[6, 3\]; .* same N inputs as layer 0, \[5, 3\]"),
        ([torch.ones(5)], r"layer 0 has shape \[5\]"),
        ([torch.ones(5, 3), torch.full((5, 3), torch.nan)], "layer 1 holds NaN.*diverged"),
        ([torch.full((5, 3), torch.inf)], "layer 0 holds infinite values"),
    ],
)
def test_unusable_features_are_named(compare: Callable[..., Tensor], features: list[Tensor], message: str) -> None:
    with pytest.raises(rdp.ArgumentError, match=message):
        compare(features)


def test_too_few_inputs_for_an_unbiased_estimate() -> None:
    with pytest.raises(rdp.ArgumentError, match="at least 4 inputs in a minibatch; got 3"):
        cka_matrix([torch.ones(3, 2)])
    with pytest.raises(rdp.ArgumentError, match="batch_size must be at least 4; got 2"):
        cka_matrix([torch.ones(8, 2)], batch_size=2)
    cka = MinibatchCKA()
    with pytest.raises(rdp.ArgumentError, match="no minibatch yet"):
        cka.compute()
    cka.update([draw(0, 4, 2)])
    with pytest.raises(rdp.ArgumentError, match="first minibatch had 1 layers, this one has 2"):
        cka.update([draw(0, 4, 2), draw(1, 4, 2)])
