"""The proof on the user's own input: what it says of sound and of odd models, and that it leaves everything alone."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rdp
from laws.architectures import BlockMLP, FoldedMLP, LoopMLP, NestedMLP, Transformer
from laws.strategies import Case, cases, every_architecture
from laws.training import identical

PROVED = "proved on two rows of the input"
KINDS = ("plain", "scaled", "activated")
MODES = pytest.mark.parametrize("mode", ["row", "batch"])


class Odd(nn.Module):
    """Everything that a forward may leave behind: counters, lists, buffers, random numbers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))
        self.g = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.drop_probability = 0.2
        self.calls = 0
        self.seen: list[float] = []
        self.register_buffer("total", torch.zeros(4))
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(random.random() + float(np.random.rand()))
        x = self.norm(self.stem(x))
        self.total += x.detach().sum(0)
        x = x + self.f(x)
        self.scores = x.detach() + torch.rand(())
        return self.head(x + nn.functional.dropout(self.g(x), self.drop_probability, self.training))


def state_of(model: nn.Module) -> list[Any]:
    """All that could have changed, but for the hooks."""
    hooks = {"_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"}
    hooks |= {"_forward_hooks_always_called"}
    attributes = [
        {name: copy.deepcopy(value) for name, value in vars(module).items() if name not in hooks | {"_modules"}}
        for module in model.modules()
    ]
    gradients = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    generators = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
    return [attributes, gradients, generators]


@MODES
@pytest.mark.parametrize("compute", ["auto", "rows"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_proof_leaves_everything_alone(mode: str, compute: str, trained: bool) -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(4, 3)
    model(x).sum().backward()
    model.train(trained)
    model.f.eval()
    before, given = state_of(model), x.clone()
    handle = rdp.attach(model, 0.5, mode=mode, compute=compute, verify=False, decay="constant", example_inputs=x)
    assert identical(state_of(model), before)
    masks, saved = handle.masks, handle.state_dict()
    checkup = handle.check(x)
    assert PROVED in checkup.facts
    assert identical(state_of(model), before)
    assert identical([handle.masks, handle.state_dict(), x], [masks, saved, given])
    assert checkup.facts[:3] == handle.check().facts[:3]


@MODES
@pytest.mark.parametrize("architecture", [BlockMLP, FoldedMLP, LoopMLP])
def test_a_proved_model_trains_as_one_that_is_not(architecture: Any, mode: str) -> None:
    parameters = []
    for verify in (True, False):
        torch.manual_seed(0)
        model = architecture(KINDS if issubclass(architecture, BlockMLP) else 3)
        handle = rdp.attach(model, 0.5, mode=mode, verify=verify)
        optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for step in range(6):
            optimizer.zero_grad()
            model(model.rows(4, step)).square().mean().backward()
            optimizer.step()
        assert (PROVED if verify else "not proved: verify=False") in str(handle).splitlines()
        parameters.append([p.detach() for p in model.parameters()])
    assert identical(*parameters)


class Coupled(BlockMLP):
    """Rows influence each other behind the branches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(0)


class Noisy(BlockMLP):
    """Draws noise in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + 0.1 * torch.randn_like(x)


class Loss(BlockMLP):
    """Returns a number beside the outputs, as models of transformers do."""

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return {"loss": x.square().mean(), "logits": x, "classes": x.argmax(1), "nothing": None}


@MODES
@pytest.mark.parametrize("architecture", [Coupled, Noisy, Loss])
def test_sound_models_that_are_no_function_of_each_row_are_proved_too(architecture: Any, mode: str) -> None:
    torch.manual_seed(0)
    model = architecture(KINDS if issubclass(architecture, BlockMLP) else 3)
    handle = rdp.attach(model, 0.5, mode=mode, example_inputs=model.rows(3, 0))
    assert str(handle).endswith(PROVED)
    assert len(handle.branches) == 3
    assert not handle.refused


@MODES
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("architecture", [BlockMLP, NestedMLP, Transformer])
def test_what_checkpoints_run_again_is_proved_too(architecture: Any, use_reentrant: bool, mode: str) -> None:
    torch.manual_seed(0)
    given = {BlockMLP: (KINDS,), NestedMLP: ((True, False),), Transformer: ("pre_norm", 2)}[architecture]
    model = architecture(*given)
    for block in model.body:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=use_reentrant)
    handle = rdp.attach(model, 0.5, mode=mode, decay="constant", example_inputs=model.rows(3, 0))
    assert str(handle).endswith(PROVED)


class Momentum(nn.Module):
    """A momentum encoder that follows in each forward, as in MoCo."""

    def __init__(self, encoder: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.encoder, self.momentum, self.in_place = encoder, copy.deepcopy(encoder).requires_grad_(False), in_place

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for follower, p in zip(self.momentum.parameters(), self.encoder.parameters(), strict=True):
                if self.in_place:
                    follower.lerp_(p, 0.1)
                else:
                    follower.data = follower.data.lerp(p, 0.1)
            key = self.momentum(x)
        return self.encoder(x) * key


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("architecture", [BlockMLP, FoldedMLP, LoopMLP])
def test_a_momentum_encoder_stays_where_it_was(architecture: Any, in_place: bool) -> None:
    torch.manual_seed(0)
    encoder = architecture(KINDS if issubclass(architecture, BlockMLP) else 3)
    model = Momentum(encoder, in_place)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1)
    before = [p.clone() for p in model.parameters()]
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=encoder.rows(3, 0))
    handle.check(encoder.rows(3, 0))
    assert identical([*model.parameters()], before)


class Large(nn.Module):
    """Takes 2e11 operations for two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_what_takes_too_long_is_proved_on_request() -> None:
    model = Large()
    inputs = torch.randn(1, 1, 64).expand(2, 12_500_000, 64)
    assert inputs.untyped_storage().nbytes() == 256
    with torch.device("meta"):
        large = Large()
    handle = rdp.attach(large, 0.5, example_inputs=inputs.to("meta"))
    assert "not proved" in str(handle)
    handle = rdp.attach(model, 0.5, example_inputs=torch.randn(2, 2, 64), verify=False)
    assert PROVED in handle.check(torch.randn(2, 2, 64)).facts


def test_why_there_is_no_proof() -> None:
    model = BlockMLP(KINDS)
    nn.init.constant_(model.head.weight, torch.nan)
    with rdp.attach(model, 0.5, example_inputs=model.rows(2, 0)) as handle:
        assert str(handle).endswith("not proved: values are not finite")
    model = BlockMLP(KINDS)
    with rdp.attach(model, 0.0, example_inputs=model.rows(2, 0)) as handle:
        assert str(handle).endswith(PROVED)  # the rate may be raised

    class OnlyAlone(BlockMLP):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and len(x) < 3:
                raise RuntimeError("needs three rows")
            return super().forward(x)

    model = OnlyAlone(KINDS)
    with rdp.attach(model, 0.5, compute="dense", example_inputs=model.rows(4, 0)) as handle:
        assert str(handle).endswith("not proved: a forward for it raised RuntimeError: needs three rows")
        model(model.rows(4, 0)).sum().backward()  # and trains


def test_a_model_that_gives_other_numbers_each_time_is_not_accused() -> None:
    class Counts(BlockMLP):
        times: ClassVar = [0]

        def forward(self, x: Tensor) -> Tensor:
            self.times[0] += 1  # in a list of the class, which nobody can put back
            return super().forward(x) * self.times[0]

    model = Counts(KINDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        handle = rdp.attach(model, 0.5, example_inputs=model.rows(2, 0))
    assert str(handle).endswith("not proved: the model gives different numbers for the same input")


@MODES
def test_the_default_device_is_of_no_account(mode: str) -> None:
    model = BlockMLP(KINDS)
    x = model.rows(2, 0)
    with torch.device("meta"):
        handle = rdp.attach(model, 0.5, mode=mode, example_inputs=x)
    assert str(handle).endswith(PROVED)


@given(cases(computes=("auto", "rows", "dense")))
@every_architecture()
def test_the_proof_changes_nothing_of_what_the_laws_draw(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        handles = []
        for verify in (True, False):
            model = case.model()
            handles.append(case.attach(model, example_inputs=model.rows(2, 0), verify=verify))
    proved, unproved = handles
    assert proved.branches == unproved.branches
    assert proved.refused == unproved.refused


class Costly(nn.Module):
    """Takes 1.3e11 operations for two rows."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(2048, 2048), nn.Linear(2048, 2048)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and not x.isfinite().all():  # which cannot be told without numbers
            return x
        x = x + self.f(x)
        return x + self.g(x)


@pytest.mark.parametrize("asks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_budget_is_kept_also_where_operations_are_counted_with_numbers(asks: bool) -> None:
    model, x = Costly(asks), torch.randn(2, 1, 2048)
    with rdp.attach(model, 0.5, example_inputs=x) as handle:
        assert str(handle).endswith(PROVED)
    with rdp.attach(model, 0.5, example_inputs=x.expand(2, 4000, 2048).contiguous()) as handle:
        assert str(handle).splitlines()[-1].startswith("not proved: two rows take 1.3e+11 operations")
