"""The feature reuse score on networks in which it is known what is reused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rdp
from rdp.analysis import cka_matrix, extract_features, feature_reuse

seeds = st.integers(0, 2**32 - 1)
depths = st.integers(2, 12)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Linears(nn.Module):
    """A residual network whose l-th layer computes exactly `x @ maps[l]`."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(*m.shape, bias=False) for m in maps)
        for branch, m in zip(self.branches, maps, strict=True):
            branch.weight.data = m.T - torch.eye(len(m))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


def layers_of(maps: list[Tensor], seed: int) -> list[Tensor]:
    x = draw(seed, 200, len(maps[0]))
    handle = rdp.attach(Linears(maps), example_inputs=x)
    return list(extract_features(handle, x).values())


@given(seeds, depths, st.floats(0.2, 5))
def test_a_network_that_passes_its_input_on_scores_1(seed: int, depth: int, scale: float) -> None:
    score = feature_reuse(layers_of([scale * torch.eye(8)] * depth, seed))
    assert score.reused == pytest.approx(1, abs=1e-4)
    assert score.recreated == pytest.approx(0, abs=1e-4)


@given(seeds, depths)
def test_a_network_that_scrambles_and_restores_scores_low(seed: int, depth: int) -> None:
    turn = torch.linalg.qr(draw(seed, 64, 64))[0]
    features = layers_of([turn, turn.T] * depth, seed)
    torch.testing.assert_close(features[0], features[-1], rtol=0, atol=1e-3)  # restored it is
    score = feature_reuse(features)
    assert score.reused < 0.1
    assert score.recreated > 0.3
    # CKA could not have told: a rotation is the same to it.
    assert cka_matrix(features).min() > 0.99


@given(seeds, depths)
def test_a_network_that_makes_new_features_in_every_layer_scores_low(seed: int, depth: int) -> None:
    features = [draw(seed + layer, 500, 16) for layer in range(depth + 1)]
    score = feature_reuse(features)
    assert score.reused < 0.05
    assert score.recreated < 0.05


@given(seeds, st.integers(1, 7))
def test_the_score_is_the_share_of_nodes_that_are_kept(seed: int, kept: int) -> None:
    """Of 8 uncorrelated nodes of equal variance, `kept` are passed on and the others are drawn anew in each layer."""
    basis = torch.linalg.qr(draw(seed, 300, 1 + 8 * 5))[0][:, 1:]
    basis = basis - basis.mean(dim=0)
    keep, new = basis[:, :kept], basis[:, 8:]
    width = 8 - kept
    features = [torch.cat((keep, new[:, layer * width : (layer + 1) * width]), dim=1) for layer in range(4)]
    assert feature_reuse(features).reused == pytest.approx(kept / 8, abs=0.03)


@given(seeds, depths)
def test_reused_and_recreated_add_up_to_similarity(seed: int, depth: int) -> None:
    features = list(draw(seed, depth + 1, 50, 5).cumsum(dim=0).unbind())
    centred = [(x - x.mean(dim=0)).flatten() for x in features]
    pairs = list(itertools.combinations(range(depth + 1), 2))
    cosines = {(k, m): max(torch.cosine_similarity(centred[k], centred[m], dim=0).item(), 0) for k, m in pairs}
    carried = [min(cosines[k, j] for j in range(k + 1, m + 1)) for k, m in pairs]
    score = feature_reuse(features)
    assert score.reused == pytest.approx(sum(carried) / len(pairs), abs=1e-4)
    assert score.reused + score.recreated == pytest.approx(sum(cosines.values()) / len(pairs), abs=1e-4)


@given(seeds)
def test_layers_are_compared_within_a_stage_only(seed: int) -> None:
    x, y = draw(seed, 30, 4, 8, 8), draw(seed ^ 1, 30, 8, 4, 4)
    assert feature_reuse([x, x, y, y]).reused == pytest.approx(1, abs=1e-5)
    with pytest.raises(rdp.ArgumentError, match="no two of these are"):
        feature_reuse([x, y])


def test_a_constant_layer_is_like_no_other() -> None:
    assert feature_reuse([draw(0, 20, 3), torch.ones(20, 3), draw(0, 20, 3)]).reused == 0
