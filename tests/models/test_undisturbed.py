"""Finding branches is looking, not touching: the model, the batch and every generator are as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import rdp
from models.found import find


class Record:
    """Batch sizes; unlike a list in a module, it is not put back after a search."""

    def __init__(self) -> None:
        self.rows: list[int] = []


class Observer(nn.Module):
    """A residual block with BatchNorm, dropout, a buffer that counts and a record of the batch sizes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.head = nn.Linear(3, 2)
        self.record = Record()

    def forward(self, x: Tensor) -> Tensor:
        self.record.rows.append(x.shape[0])
        x = self.frozen(x)
        return self.head((x + self.f(x)).relu_().mean((2, 3)))


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model's state that a forward could touch."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "versions": [tensor._version for tensor in [*model.parameters(), *model.buffers()]],
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(getattr(module, hooks)) for hooks in vars(module) if hooks.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "requires grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


MODELS = {
    "observer": lambda: Observer(),
    "resnet": lambda: timm.create_model("test_resnet"),
    "vit": lambda: timm.create_model("test_vit", proj_drop_rate=0.1),
    "levit": lambda: timm.create_model("levit_128s"),  # caches in eval mode what training must not see
    "nfnet": lambda: timm.create_model("test_nfnet"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("compute", ["auto", "dense"])
def test_discovery_leaves_everything_as_it_was(make: Any, training: bool, compute: str) -> None:
    model = make()
    side = 224 if "levit" in type(model).__name__.lower() else 160
    batch = torch.randn(2, 3, side, side)
    model(batch).sum().backward()  # so that there are gradients and statistics to disturb
    model.train(training)
    next(model.modules()).training = True  # and a mixture of modes
    if isinstance(model, Observer):
        model.frozen.eval()
    before, drawn, pixels, version = everything(model), generators(), batch.clone(), batch._version
    with rdp.attach(model, example_inputs=batch, compute=compute) as handle:
        assert handle.branches
        found = everything(model)
        assert [key for key in before if not same(before[key], found[key])] == ["hooks"]
    after = everything(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert generators() == drawn
    assert torch.equal(batch, pixels)
    assert (batch._version, batch.grad, batch.requires_grad) == (version, None, False)


def test_discovery_leaves_no_trace_when_the_forward_raises() -> None:
    model, wrong = Observer().train(), torch.randn(2, 5, 8, 8)
    before, drawn = everything(model), generators()
    with pytest.raises(rdp.ArgumentError, match="RuntimeError: running_mean"):
        rdp.attach(model, example_inputs=wrong)
    after = everything(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert generators() == drawn


def test_at_most_two_rows_of_a_large_batch_are_used() -> None:
    model = Observer()
    find(model, torch.randn(1000, 3, 4, 4), verify=False)
    assert max(model.record.rows) == 2
    assert sum(model.record.rows) <= 8  # two of them to look for own dropping
    find(model, torch.randn(1000, 3, 4, 4))
    assert max(model.record.rows) == 2


def test_the_first_training_forward_finds_branches_on_two_rows_and_then_runs_once_on_all() -> None:
    model = Observer().train()
    rdp.attach(model, rate=0.5)
    model(torch.randn(64, 3, 4, 4))
    assert (max(model.record.rows[:-1]), model.record.rows[-1]) == (2, 64)


def test_a_batch_of_one_row_is_enough() -> None:
    assert [b.name for b in find(Observer(), torch.randn(1, 3, 4, 4)).branches] == ["f"]


def test_inputs_that_need_gradients_get_none() -> None:
    batch = torch.randn(2, 3, 4, 4, requires_grad=True)
    find(Observer(), batch)
    assert batch.grad is None
