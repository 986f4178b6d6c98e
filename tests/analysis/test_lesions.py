"""What lesions measure: each branch by itself, the curve, and nothing that stays in the model or is drawn from it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import rdp
from rdp.analysis import lesions


class Sums(nn.Module):
    """Adds weights 8, 1, 4, 2 to a sum of ones, each in a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
        for layer, worth in zip(self.layers, (8.0, 1.0, 4.0, 2.0), strict=True):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, worth)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.ones(2, 1)


def attached() -> rdp.ResidualDropPath:
    return rdp.attach(Sums(), example_inputs=X)


def mean(model: nn.Module) -> Tensor:
    return model(X).mean()


def test_the_table_and_the_curve_are_the_networks_without_branches() -> None:
    found = lesions(attached(), mean, random=3, progress=False)
    assert found.whole == 16
    assert [(each.name, each.metric, each.worth) for each in found.table] == [
        ("layers.0", 8, 8), ("layers.1", 15, 1), ("layers.2", 12, 4), ("layers.3", 14, 2),
    ]  # fmt: skip
    assert found.order == ("layers.0", "layers.2", "layers.3", "layers.1")
    assert found.least == {0: 16, 1: 15, 2: 13, 3: 9, 4: 1}
    assert list(found.random) == [0, 1, 2, 3, 4]
    assert all(len(drawn) == 3 for number, drawn in found.random.items() if 0 < number < 4)
    assert all(16 - 12 - 2 * (n > 1) <= value <= 16 for n in (1, 2) for value in found.random[n])
    assert "layers.2          12          4" in str(found)


def test_of_a_loss_more_is_worse() -> None:
    found = lesions(attached(), lambda model: -mean(model), higher_is_better=False, progress=False)
    assert [each.worth for each in found.table] == [8, 1, 4, 2]
    assert found.least[2] == -13


def test_an_evaluation_may_take_the_model_or_nothing_and_is_called_as_often_as_is_said() -> None:
    handle = attached()
    calls: list[int] = []

    def evaluate() -> float:
        calls.append(1)
        return float(mean(handle.model))

    assert lesions(handle, evaluate, random=2, progress=False) == lesions(handle, mean, random=2, progress=False)
    assert len(calls) == 1 + 4 + 3 + 2 * 2
    few = lesions(handle, evaluate, points=2, random=0, progress=False)
    assert list(few.least) == [0, 2, 4]
    assert few.random == {}


def test_nothing_stays_and_every_evaluation_draws_the_same_numbers() -> None:
    handle = attached()
    model = handle.model
    model.layers[1].eval()
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    drawn, modes = [], []

    def evaluate() -> float:
        drawn.append(torch.rand(()).item())
        modes.append(any(m.training for m in model.modules()))
        value = mean(model).item()
        model.train()  # as many evaluations end
        return value

    lesions(handle, evaluate, progress=False)
    assert len(set(drawn)) == 1
    assert not any(modes)
    assert [m.training for m in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
    assert handle.step_count == 0
    assert handle.masks.numel() == 0
    assert all(len(layer._forward_hooks) <= 1 for layer in model.layers)


def test_what_is_lost_altogether_is_worth_most() -> None:
    handle = attached()

    def evaluate(model: nn.Module) -> float:
        value = float(mean(model))
        return math.nan if value == 15 else value

    assert lesions(handle, evaluate, progress=False).order[0] == "layers.1"
    with pytest.raises(rdp.ArgumentError, match="returned nan for the network with all of its branches"):
        lesions(handle, lambda model: float(mean(model)) * math.nan, progress=False)


def test_another_model_and_other_values_are_refused() -> None:
    handle = attached()
    other = copy.deepcopy(handle.model)
    with pytest.raises(rdp.ArgumentError, match="any branch of the attached Sums: it called another model"):
        lesions(handle, lambda: mean(other), progress=False)
    with pytest.raises(rdp.ArgumentError, match=r"must return a number; got \{'accuracy'"):
        lesions(handle, lambda model: {"accuracy": float(mean(model))}, progress=False)
    with pytest.raises(rdp.ArgumentError, match="points must be at least 1 and random at least 0; got 0 and 2"):
        lesions(handle, mean, points=0, progress=False)
    with pytest.raises(rdp.ArgumentError, match="not known yet"):
        lesions(rdp.attach(Sums()), mean, progress=False)
    with pytest.raises(rdp.ArgumentError, match="got the model"):
        lesions(other, mean, progress=False)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resnet18_on_1500_digits() -> None:
    """Under a minute on two cores that do nothing else; it is 28 forwards of 1,500 digits."""
    import timm

    model = timm.create_model("resnet18", in_chans=1, num_classes=10)
    digits, labels = torch.randn(1500, 1, 28, 28), torch.randint(0, 10, (1500,))
    handle = rdp.attach(model, example_inputs=digits[:2])
    batches = 0

    @torch.no_grad()
    def accuracy() -> float:
        nonlocal batches
        batches += 1
        return float((model(digits).argmax(1) == labels).float().mean())

    found = lesions(handle, accuracy)
    assert batches == 1 + 8 + 7 + 2 * 6
    assert len(found.table) == 8
