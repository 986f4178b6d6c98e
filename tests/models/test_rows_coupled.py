"""A first axis that is not the batch is noticed: its "rows" influence each other."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
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


class Noise(nn.Module):
    """Draws in eval mode too."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(x)


class Residual(nn.Module):
    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(32, 32), *inside, nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": torch.randn_like,
    "gumbel": lambda x: -torch.log(-torch.log(torch.rand(x.shape))),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "python": lambda x: torch.full_like(x, random.random()),
    "numpy": lambda x: torch.from_numpy(np.random.uniform(size=x.shape)).to(x),
}


@pytest.mark.parametrize("compute", ["auto", "dense"])
@pytest.mark.parametrize("draw", NOISE.values(), ids=NOISE)
def test_noise_is_not(draw: Callable[[Tensor], Tensor], compute: Any) -> None:
    torch.manual_seed(0)
    for model in (nn.Sequential(Noise(draw), Residual(), Residual()), nn.Sequential(Residual(Noise(draw)), Residual())):
        with warnings.catch_warnings():
            warnings.simplefilter("error", rdp.RdpWarning)
            handle = rdp.attach(model, 0.1, compute=compute, example_inputs=torch.randn(4, 32))
        notes = {branch.name: branch.note for branch in handle.branches}
        inside = compute == "auto" and isinstance(model[0], Residual)
        assert notes == dict.fromkeys(notes, "") | ({"0.f": "dense: it draws random numbers"} if inside else {})


class Mixes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0)


def test_rows_that_influence_each_other_are_noticed_beside_noise() -> None:
    model = nn.Sequential(Noise(torch.randn_like), Residual(Mixes()))
    with pytest.warns(rdp.RdpWarning, match="influence each other even in eval mode, first in `1.f`"):
        handle = rdp.attach(model, 0.1, example_inputs=torch.randn(4, 32))
    assert handle.branches[0].note == "dense: its rows influence each other"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("inside", [(), (nn.ReLU(),), (nn.LayerNorm(32),)], ids=["linear", "relu", "norm"])
def test_numbers_that_are_not_finite_are_the_reason(value: float, where: str, inside: tuple[nn.Module, ...]) -> None:
    model = nn.Sequential(Residual(*inside), Residual(*inside))
    with torch.no_grad():
        getattr(model[0].f[0], where)[0] = value
    with pytest.warns(rdp.RdpWarning, match="values are not finite, first in `0.f`") as told:
        handle = rdp.attach(model, 0.1, example_inputs=torch.randn(4, 32))
    assert len(told) == 1
    assert [branch.note for branch in handle.branches] == ["dense: its values are not finite"] * 2
