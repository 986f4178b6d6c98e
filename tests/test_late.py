"""Branches that a model runs only later: told, once, and nothing is told of what else it may do later."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws.architectures import WIDTH, MLPBlock
from torch import Tensor, nn

import rdp


class Growing(nn.Module):
    """It runs `depth` of its blocks, and what `extra` says besides."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(MLPBlock() for _ in range(4))
        self.neck, self.auxiliary = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.depth, self.extra = depth, ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[: self.depth]:
            x = block(x)
        if self.extra == "neck":
            x = torch.tanh(self.neck(x))
        y = self.head(x)
        if self.extra == "block" and self.training:  # a prediction of what comes after, say
            y = y + self.auxiliary(self.blocks[3](x))
        return y + self.auxiliary(x) if self.extra == "auxiliary" and self.training else y


def train(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    """Train for some steps; what was told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
    return [str(warning.message) for warning in told if issubclass(warning.category, rdp.RdpWarning)]


def attached(depth: int = 2, **arguments: Any) -> tuple[Growing, rdp.ResidualDropPath, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Growing(depth)
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=torch.randn(2, 3), **arguments)
    return model, handle, handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_branches_that_run_later_are_told_once(mode):
    model, handle, optimizer = attached(mode=mode)
    assert train(model, optimizer, 4) == []
    model.depth = 3
    (text,) = train(model, optimizer, 4)
    assert text.startswith("`blocks.2.fc2` did not run when the branches were found, and are trained plainly now")
    model.depth = 4
    assert train(model, optimizer, 4) == []  # it was told
    (problem,) = handle.check().problems
    assert problem.startswith("`blocks.2.fc2`, `blocks.3.fc2` did not run when the branches were found")
    handle.remove()
    with rdp.attach(model, 0.5, decay="constant", mode=mode, example_inputs=torch.randn(2, 3)) as again:
        assert train(model, again.wrap(torch.optim.SGD(model.parameters(), lr=0.01)), 4) == []
        assert len(again.branches) == 4
        assert again.check().ok


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_looked_at_too(in_place):
    model, handle, optimizer = attached()
    call = torch.compile(model, backend="eager") if not in_place else model
    if in_place:
        model.compile(backend="eager")
    told = train(call, optimizer, 4)
    model.depth = 4
    (text,) = [text for text in train(call, optimizer, 4) if text not in told]
    assert text.startswith("`blocks.2.fc2`, `blocks.3.fc2` did not run")
    assert len(handle.check().problems) == 1


def test_a_branch_that_runs_in_training_alone_is_told():
    model, handle, optimizer = attached()
    model.extra = "block"
    (text,) = train(model, optimizer, 4)
    assert text.startswith("`blocks.3.fc2` did not run")
    assert text.endswith("what runs in training alone cannot be found")
    assert len(handle.check().problems) == 1


def test_check_names_them_for_inputs_that_are_given():
    model, handle, _ = attached()
    model.depth = 4
    with pytest.warns(rdp.RdpWarning, match=r"`blocks.2.fc2`, `blocks.3.fc2` did not run"):
        checkup = handle.check(torch.randn(2, 3))
    assert "`blocks.2.fc2`, `blocks.3.fc2` did not run when the branches were found" in str(checkup)


def test_looking_again_changes_nothing():
    """Masks, parameters and random numbers are those of a run in which nobody looks, since the branches are named."""
    runs = []
    for looks in (True, False):
        model, handle, optimizer = attached(seed=3, branches=None if looks else ["blocks.0.fc2", "blocks.1.fc2"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, optimizer, 4)
            model.depth = 4
            train(model, optimizer, 6)
        assert handle.check().ok is not looks
        runs.append((handle.masks, [p.detach() for p in model.parameters()], torch.rand(1)))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("extra", ["neck", "auxiliary"])
def test_other_layers_that_join_later_are_no_branches(extra):
    model, handle, optimizer = attached()
    assert train(model, optimizer, 4) == []
    model.extra = extra
    assert train(model, optimizer, 6) == []
    assert handle.check().ok


def test_who_has_chosen_the_branches_is_told_of_those_that_were_meant():
    model, handle, optimizer = attached(branches=["blocks.1.fc2"])
    model.depth = 4
    assert train(model, optimizer, 4) == []
    assert handle.check().ok
    model, handle, optimizer = attached(branches=lambda name, module: "blocks.3" not in name)
    model.depth = 4
    (text,) = train(model, optimizer, 4)
    assert text.startswith("`blocks.2.fc2` did not run")


def test_where_plain_is_meant_nothing_is_told():
    """After the handle is removed, and at rate 0 until that is raised."""
    model, handle, optimizer = attached()
    model.depth = 4
    assert train(model, optimizer, 1) == []
    handle.remove()
    assert train(model, optimizer, 4) == []

    model = Growing(2)
    handle = rdp.attach(model, 0.0, example_inputs=torch.randn(2, 3))
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    model.depth = 4
    assert train(model, optimizer, 4) == []
    assert "did not run" not in str(handle.check(torch.randn(2, 3)))
    handle.rate = 0.5
    (text,) = train(model, optimizer, 4)
    assert text.startswith("`blocks.2.fc2`, `blocks.3.fc2` did not run")


def test_what_does_not_learn_is_not_told():
    model, handle, optimizer = attached()
    model.depth = 4
    model.blocks[2:].requires_grad_(False)
    assert train(model, optimizer, 4) == []
    assert handle.check().ok
