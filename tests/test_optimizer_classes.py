"""Every optimizer of torch and of timm under RDP is the plain one on the live parameters alone (`laws.twins`)."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import timm.optim
import torch
from laws.training import identical, loss, snapshot
from laws.twins import CASE, STEPS, Twins
from torch import Tensor, nn
from torch.optim import Optimizer

import rdp

# -- torch.optim -----------------------------------------------------------------------------------------------------

CLASSES = sorted(
    (
        cls
        for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(cls, Optimizer) and cls is not Optimizer
    ),
    key=lambda cls: cls.__name__,
)
BY_CLOSURE = {torch.optim.LBFGS}
SPARSE_ONLY = {torch.optim.SparseAdam}
MATRICES_ONLY = {getattr(torch.optim, "Muon", None)}
SWITCHES = ("foreach", "fused", "maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay")
"""Not `capturable`, which needs an accelerator, nor `differentiable`, which refuses parameters of a module (leaves)."""


def options(cls: type[Optimizer]) -> list[dict[str, Any]]:
    """The variants of a class that run on a CPU: its defaults with momentum and decay, and each of its switches."""
    accepted = inspect.signature(cls).parameters
    base = {
        name: value for name, value in {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}.items() if name in accepted
    }
    switches = [name for name in SWITCHES if name in accepted]
    return [base, *(base | {name: True} for name in switches)]


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Does an optimizer for matrices only take this parameter?"""
    return p.dim() == 2


VARIANTS = [
    pytest.param(cls, chosen, id="-".join([cls.__name__, *(name for name, on in chosen.items() if on is True)]))
    for cls in CLASSES
    if cls not in BY_CLOSURE | SPARSE_ONLY
    for chosen in options(cls)
]


@pytest.mark.parametrize(("cls", "chosen"), VARIANTS)
def test_every_class_of_torch(cls: type[Optimizer], chosen: dict[str, Any]) -> None:
    fused_sgd = cls is torch.optim.SGD and chosen.get("fused", False)
    # The plain fused SGD fails on parameters that get their first gradient late; its twin is not fused, so rounds
    # otherwise.
    plainly = chosen | {"fused": False} if fused_sgd else chosen
    twins = Twins(
        make=lambda ps: cls(ps, **chosen),
        make_plain=lambda ps: cls(ps, **plainly),
        takes=is_matrix if cls in MATRICES_ONLY else None,
        exact=not fused_sgd,
    )
    twins.run()


def test_the_classes_are_those_of_torch() -> None:
    """The sets of special cases name real classes, and the rest is enumerated."""
    assert len(CLASSES) >= 13
    assert set(CLASSES) >= BY_CLOSURE | SPARSE_ONLY | {torch.optim.Adafactor, torch.optim.AdamW, torch.optim.SGD}


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    """It keeps one state for all parameters and moves them along one direction: the frozen ones are put back."""
    twins = Twins(lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=4, line_search_fn=line_search))
    model, plain = twins.model, twins.plain_model
    frozen_ever = 0
    for number in range(STEPS):
        x, phase = model.rows(4, number), twins.handle.phase
        seen: list[Tensor] = []

        def closure(x=x, seen=seen) -> Tensor:
            twins.optimizer.zero_grad()
            value = model(x).square().sum()
            value.backward()
            seen.append(twins.handle.masks)
            return value

        before = copy.deepcopy(dict(model.named_parameters()))
        twins.optimizer.step(closure)
        assert len(seen) > 1
        assert all(identical(masks, seen[0]) for masks in seen), "every call of the closure replays the same masks"
        frozen = before.keys() - CASE.live(seen[0], phase)
        assert all(identical(before[name], p) for name, p in model.named_parameters() if name in frozen)
        assert any(not identical(before[name], p) for name, p in model.named_parameters() if name not in frozen)
        frozen_ever += len(frozen)

        def plain_closure(x=x, masks=seen[0], phase=phase, frozen=frozen, before=before) -> Tensor:
            twins.plain.zero_grad()
            with torch.no_grad():
                for name in frozen:
                    plain.get_parameter(name).copy_(before[name])
            value = CASE.oracle(plain, x, masks, phase).square().sum()
            value.backward()
            for name in frozen:
                plain.get_parameter(name).grad = None
            return value

        twins.plain.step(plain_closure)
        with torch.no_grad():
            for name in frozen:
                plain.get_parameter(name).copy_(before[name])
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    assert frozen_ever > 0
    assert twins.handle.step_count == STEPS


class Lookup(nn.Module):
    """Residual branches that look their output up in a table, whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.tables = nn.ModuleList(nn.Embedding(5, 5, sparse=True) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for table in self.tables:
            x = x + table(x.argmax(1))
        return x


def test_sparse_adam() -> None:
    """It takes sparse gradients only, so it trains the tables and another optimizer the rest."""
    torch.manual_seed(0)
    model = Lookup()
    handle = rdp.attach(model, rate=0.5, mode="batch", decay="constant", seed=1)
    tables = torch.optim.SparseAdam(model.tables.parameters(), lr=0.1)
    optimizers = [handle.wrap(tables), handle.wrap(torch.optim.SGD(model.stem.parameters(), lr=0.1))]
    words: dict[str, Tensor] = {}
    for name, table in model.tables.named_children():
        table.register_forward_pre_hook(lambda _, args, name=name: words.update({name: args[0]}))
    frozen_ever = moved_ever = 0
    for number in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model(torch.randn(3, 3))).backward()
        learning = (handle.masks if handle.phase is rdp.Phase.DROP else ~handle.masks).any(1)
        before = snapshot(model, tables)
        for optimizer in optimizers:
            optimizer.step()
        after = snapshot(model, tables)
        assert handle.step_count == number + 1
        for branch, learns in zip(handle.branches, learning.tolist(), strict=True):
            (name,) = branch.parameters
            if not learns:
                assert identical(before[name], after[name])
                frozen_ever += 1
                continue
            moved = (before[name][0] != after[name][0]).any(1).nonzero().flatten()
            assert identical(moved, words[name.split(".")[1]].unique()), "it moves where words were looked up"
            moved_ever += 1
    assert len(handle.branches) == 4
    assert min(frozen_ever, moved_ever) > 0


# -- timm's factory --------------------------------------------------------------------------------------------------

CUDA_ONLY = ("bnb", "fused")
"""Prefixes of the names of those that need bitsandbytes or Apex, and a GPU."""
TIMM = [name for name in timm.optim.list_optimizers() if not name.startswith(CUDA_ONLY)]


@pytest.fixture
def eager():
    """Some of timm's optimizers compile themselves, which takes a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", [*TIMM, "lookahead_adamw"])
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.usefixtures("eager")
def test_every_optimizer_of_timm(name: str) -> None:
    second_order = name == "adahessian"
    twins = Twins(lambda ps: timm.optim.create_optimizer_v2(list(ps), name, lr=0.01, weight_decay=0.1))
    twins.exact = not second_order
    twins.run(create_graph=second_order)


def test_the_optimizers_of_timm_are_many() -> None:
    assert len(TIMM) > 60
