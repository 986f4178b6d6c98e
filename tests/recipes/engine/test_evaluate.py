from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from engine.evaluate import evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


def run(model: nn.Module, batches: list[tuple[Tensor, Tensor]], classes: int, flip: bool = False) -> dict[str, float]:
    return evaluate(model, batches, classes=classes, device=torch.device("cpu"), autocast=nullcontext, flip=flip)


@given(classes=st.integers(2, 12), sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_every_sample_counts_once_whatever_the_batches(classes: int, sizes: list[int], seed: int) -> None:
    sizes = [*sizes, 3]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(sizes), classes, generator=generator)
    labels = torch.randint(classes, (sum(sizes),), generator=generator)
    batches = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(logits.tolist(), labels.tolist())]  # noqa: B905
    numbers = run(nn.Identity(), batches, classes)
    assert numbers["top1"] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / len(ranks))
    assert numbers["top5"] == pytest.approx(100 * sum(rank < min(5, classes) for rank in ranks) / len(ranks))
    assert numbers["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_flip_averages_an_image_and_its_mirror() -> None:
    images = torch.tensor([[[[3.0, 1.0]]], [[[1.0, 2.0]]]])  # logits are the two pixels; mirrored, they tie
    model = nn.Flatten()
    labels = torch.tensor([1, 0])
    assert run(model, [(images, labels)], 2)["top1"] == 0
    assert run(model, [(images, labels)], 2, flip=True)["test_loss"] == pytest.approx(0.693147, rel=1e-5)


def test_no_gradient_is_recorded() -> None:
    model = nn.Linear(3, 3)
    run(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], 3)
    assert model.weight.grad is None


def test_a_loss_that_is_not_a_number_is_not_left_out() -> None:
    batches = [(torch.full((4, 3), value), torch.zeros(4, dtype=torch.long)) for value in (0.0, float("nan"))]
    assert math.isnan(run(nn.Identity(), batches, 3)["test_loss"])
