"""A first axis that is not the batch is noticed: its "rows" influence each other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import rdp


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2)


def test_a_sequence_in_the_place_of_the_batch_is_warned_about():
    with pytest.warns(rdp.RdpWarning, match="influence each other even in eval mode, first in `layers.0.dropout1`"):
        rdp.attach(encoder(batch_first=False), 0.1, example_inputs=torch.randn(5, 3, 8))


def test_a_batch_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rdp.attach(encoder(batch_first=True), 0.1, example_inputs=torch.randn(5, 3, 8))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


class Amplifier(nn.Module):
    """A residual network deep and steep enough for rounding errors to grow to the size of its features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), Sine()) for _ in range(48))
        for layer in self.layers:
            nn.init.normal_(layer[0].weight, std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_rounding_errors_that_grow_with_depth_are_not():
    model = Amplifier()
    x = torch.randn(2, 64)
    alone, together = model(x[:1]), model(x)[:1]
    assert (
        alone - together
    ).abs().max() > 0.05 * alone.abs().max()  # far beyond rounding, yet the rows are independent
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        rdp.attach(model, 0.1, example_inputs=x, compute="dense")
