"""Every reason why a branch, or its beginning, cannot be run on some of the rows, word by word as in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rdp
from models.test_branches import DIM, net


class Takes(nn.Module):
    """A linear layer that is called with more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, other: object = None) -> Tensor:
        return self.linear(x + other if isinstance(other, Tensor) and other.shape == x.shape else x)


class Forks(nn.Module):
    """The fork lies in a module, and the sum outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return x, self.second(x)


class State:
    pass


def linear(**changes: nn.Module) -> dict[str, nn.Module]:
    return {"f": nn.Linear(DIM, DIM), "g": nn.Linear(DIM, DIM)} | changes


def in_place_on_a_view(s: Any, x: Tensor) -> Tensor:
    h = s.f(x)
    h[:, :2].mul_(2)
    return x + s.g(h)


def shared_first_module(s: Any, x: Tensor) -> Tensor:
    h = s.f(x)
    return x + s.g(h) + s.h(h)


def from_before(s: Any, x: Tensor) -> Tensor:
    fork = s.stem(x)
    return fork + s.g(s.f(fork) * x)


def rows_by_rows(s: Any, x: Tensor) -> Tensor:
    fork = s.stem(x)
    return fork + s.g(s.f(fork, x @ x.T))


def used_again(s: Any, x: Tensor) -> Tensor:
    h = s.f(x)
    return x + s.h(s.g(h) * h)


def another_output(s: Any, x: Tensor) -> Tensor:
    a, b = s.f(x)
    return a + b


REASONS: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]] = {
    "the model computes differently for one row": (
        lambda s, x: x + s.g(s.f(x).tanh() if len(x) > 1 else s.f(x)),
        linear(),
    ),
    "its modules serve something else too": (shared_first_module, linear(h=nn.Linear(DIM, DIM))),
    "its first module takes several tensors of the branch": (lambda s, x: x + s.f(x, x.tanh()), {"f": Takes()}),
    "the branch is not a chain of modules": (used_again, linear(h=nn.Linear(DIM, DIM))),
    "the fork lies inside a module of the branch": (another_output, {"f": Forks()}),
    "a value was written through an alias": (in_place_on_a_view, linear()),
    "a bare function applies dropout": (lambda s, x: x + s.g(functional.dropout(s.f(x), 0.5, s.training)), linear()),
    "an argument changes its type with the batch": (
        lambda s, x: x + s.f(x, None if len(x) == 1 else 1),
        {"f": Takes()},
    ),
    "an argument changes its length with the batch": (lambda s, x: x + s.f(x, [0] * len(x)), {"f": Takes()}),
    "an argument is a State, which may have a state": (lambda s, x: x + s.f(x, State()), {"f": Takes()}),
    "an argument depends on the batch": (lambda s, x: x + s.f(x, 3 if len(x) == 2 else 2), {"f": Takes()}),
    "a bare function takes a tensor from outside of the branch": (from_before, linear(stem=nn.Linear(DIM, DIM))),
    "an argument's shape follows the batch in an unclear way": (
        rows_by_rows,
        linear(f=Takes(), stem=nn.Linear(DIM, DIM)),
    ),
    "a value in the branch is the same for every batch": (
        lambda s, x: x + s.h(s.g(s.f(x).mean(0, keepdim=True)).expand(len(x), -1)),
        linear(h=nn.Linear(DIM, DIM)),
    ),
    "`block.f` is called several times": (lambda s, x: x + s.g(s.f(s.f(x))), linear()),
    "a parametrization may have a state": (
        lambda s, x: x + s.f(x),
        {"f": nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM))},
    ),
    "it does not end in one module": (
        lambda s, x: x + torch.cat((s.f(x), s.g(x)), -1),
        {"f": nn.Linear(DIM, DIM // 2), "g": nn.Linear(DIM, DIM // 2)},
    ),
    "it has dropout inside; compute='rows' would run it on rows": (
        lambda s, x: x + s.f(x),
        {"f": nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.1))},
    ),
    "BatchNorm1d, see compute='ghost'": (
        lambda s, x: x + s.f(x),
        {"f": nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM))},
    ),
    "a forward on some rows raised RuntimeError": (lambda s, x: x + s.g(s.f(x).view(x.shape[0], DIM)), linear()),
    "its rows influence each other": (
        lambda s, x: x + s.f(x),
        {"f": nn.Sequential(nn.Linear(DIM, DIM), nn.Softmax(0))},
    ),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.filterwarnings("ignore:the rows of a batch influence", "ignore:.* residual sums are left ungated")
def test_a_dense_branch_says_why(reason: str) -> None:
    torch.manual_seed(0)
    body, layers = REASONS[reason]
    with rdp.attach(net(body, **layers), 0.5, decay="constant", example_inputs=torch.randn(4, DIM)) as handle:
        notes = [branch.note.rpartition(": ")[2] for branch in handle.branches]
        assert all(branch.note.startswith(("dense: ", "rows from ")) for branch in handle.branches if branch.note)
    assert reason in notes, str(handle)


class Drops(nn.Module):
    """Drops out by a function, as attention does; the probability is an attribute like any other."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.linear, self.attn_Drop = nn.Linear(DIM, DIM), probability

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.linear(x), self.attn_Drop, self.training)


@pytest.mark.parametrize(("probability", "compute"), [(0.1, "dense"), (0.0, "rows")])
def test_dropout_by_a_function_inside_of_a_module_is_known_by_its_attribute(probability: float, compute: str) -> None:
    model = net(lambda s, x: x + s.f(x), f=Drops(probability))
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=torch.randn(4, DIM))
    assert [branch.compute for branch in handle.branches] == [compute]
