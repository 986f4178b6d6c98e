"""`rdp.discovery.chance`: draws that are forced, whoever draws, and what is seen of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from random import random as imported_before

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdp.discovery.chance import chance_trace, draws_numbers, forced
from rdp.discovery.forwards import undisturbed

UNIT: dict[str, Callable[[], object]] = {
    "rand": lambda: torch.rand(3),
    "half": lambda: torch.rand(3, dtype=torch.float16),
    "rand_like": lambda: torch.rand_like(torch.ones(2, 2)),
    "uniform_": lambda: torch.empty(3).uniform_(),
    "range": lambda: torch.empty(3).uniform_(-2, 4) / 6 + 1 / 3,
    "own generator": lambda: torch.rand(3, generator=torch.Generator()),
    "randint": lambda: torch.randint(5, 10, (3,)).sub(5) / 4,
    "python": lambda: random.random(),
    "imported": lambda: imported_before(),
    "python uniform": lambda: random.uniform(0, 1),
    "randrange": lambda: random.randrange(2),
    "numpy": lambda: np.random.random(),
    "numpy uniform": lambda: np.random.uniform(size=5),
    "numpy binomial": lambda: np.random.binomial(1, 0.5),
    "numpy randint": lambda: np.random.randint(2),
}


@pytest.mark.parametrize("draw", UNIT.values(), ids=UNIT)
@pytest.mark.parametrize("high", [False, True])
def test_every_draw_is_low_or_high(draw: Callable[[], object], high: bool) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    with torch.random.fork_rng(devices=[]), forced(high):
        numbers = torch.as_tensor(draw(), dtype=torch.float64)
    assert bool((numbers - float(high)).abs().max() < 1e-2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_a_coin_that_has_one_side_shows_it(chance: float, high: bool) -> None:
    with torch.random.fork_rng(devices=[]), forced(high):
        tossed = [torch.empty(2).bernoulli_(chance), torch.bernoulli(torch.full((2,), chance))]
    expected = float(chance > 0.5 or (chance == 0.5 and not high))
    assert all(tensor.tolist() == [expected] * 2 for tensor in tossed)


@pytest.mark.parametrize("high", [False, True])
def test_who_throws_numbers_away_until_one_fits_comes_to_an_end(high: bool) -> None:
    with torch.random.fork_rng(devices=[]), forced(high):
        assert np.isfinite([np.random.randn(), random.gauss(0, 1), random.normalvariate(0, 1)]).all()
        assert sorted(random.sample(range(7), 7)) == list(range(7))


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.draw, self.count = nn.Linear(4, 4), draw, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.training:
            self.draw(x)
        return self.linear(x)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda x: None, False),
        (lambda x: nn.functional.dropout(x, 0.5), False),
        (lambda x: nn.functional.dropout(x[:, :1] * 0, 0.0), False),
        (lambda x: nn.functional.dropout(torch.ones(2, 1), 0.5), True),
        (lambda x: float(torch.rand(1, device=x.device)), True),
        (lambda x: random.random(), True),
        (lambda x: np.random.rand(), True),
        (lambda x: x.sum().item() + torch.rand(()), True),
        (lambda x: x.sum().item(), False),
    ],
)
def test_drawing_is_seen_and_leaves_nothing_behind(draw: Callable[[Tensor], object], expected: bool) -> None:
    model, inputs = Draws(draw).train(), ((torch.randn(2, 4),), {})
    drawn = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    with undisturbed(model):
        assert draws_numbers(model, inputs) == expected
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == drawn
    assert (model.count, model.training) == (0, True)


def test_a_model_that_cannot_be_trained_without_more_is_not_known() -> None:
    def fails(x: Tensor) -> None:
        raise ValueError("targets are missing")

    model, inputs = Draws(fails).train(), ((torch.randn(2, 4),), {})
    with undisturbed(model):
        assert not draws_numbers(model, inputs)
        assert chance_trace(model, inputs, high=True) is None
