"""`rdp.prune`: what is kept, and what it says where that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rdp
from rdp.analysis import lesions


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Functional(MLP):
    """The last branch begins with a function that takes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, 4)), nn.LayerNorm(4)

    def forward(self, x):
        x = super().forward(x)
        return x + self.norm(F.linear(x, self.weight))


def attached(kind=MLP):
    torch.manual_seed(0)
    return rdp.attach(kind(), example_inputs=torch.randn(2, 4))


def kept(handle, **arguments):
    pruned = rdp.prune(handle, **arguments)
    return [i for i, layer in enumerate(pruned.layers) if any(True for _ in layer.parameters())]


def test_keep_is_names_a_function_or_a_fraction_with_an_order():
    handle = attached()
    x = torch.randn(8, 4)
    table = lesions(handle, lambda model: float(model(x).square().mean()), higher_is_better=False, progress=False)
    best = sorted(range(4), key=lambda i: -table.table[i].worth)
    assert kept(handle, keep=["layers.1", "layers.3"]) == [1, 3]
    assert kept(handle, keep="layers.2") == [2]
    assert kept(handle, keep=lambda name, module: name != "layers.0") == [1, 2, 3]
    assert kept(handle, keep=0.75, order=table) == sorted(best[:3])
    assert kept(handle, keep=0.5, order=["layers.3", "layers.0", "layers.1", "layers.2"]) == [0, 3]
    assert kept(handle, keep=0, order=table) == []
    assert kept(handle, keep=()) == []
    assert kept(handle, keep=1.0, order=table) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": 0.75}, rdp.ArgumentError, "not which: give order=rdp.analysis.lesions"),
        ({"keep": 3}, rdp.ArgumentError, r"fraction of the branches in \[0, 1\]; got 3"),
        ({"keep": True}, rdp.ArgumentError, "by name, or by a function"),
        ({"keep": ["layers.9"]}, rdp.BranchError, "'layers.9' is no branch .* did you mean"),
        ({"keep": ["layers.1"], "order": ["layers.1"]}, rdp.ArgumentError, "order belongs to a fraction"),
        ({"keep": 0.5, "order": ["layers.1"]}, rdp.ArgumentError, "differs in layers.0, layers.2, layers.3"),
    ],
)
def test_what_cannot_be_meant_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        rdp.prune(attached(), **arguments)


def test_what_cannot_be_taken_out_is_refused_by_name():
    handle = attached(Functional)
    names = [branch.name for branch in handle.branches]
    assert names == ["layers.0", "layers.1", "layers.2", "layers.3", "norm"]
    with pytest.raises(rdp.BranchError, match=r"^`norm` cannot be taken out of the model: `weight` is used by"):
        rdp.prune(handle, keep=["layers.1"])
    rdp.prune(handle, keep=["norm"])


def test_what_serves_something_else_too_stays():
    class Shared(MLP):
        def forward(self, x):
            return super().forward(x) + self.layers[1][0](x)  # one of its modules, besides

    handle = rdp.attach(Shared(), branches=["layers.0", "layers.1"], example_inputs=torch.randn(2, 4))
    pruned = rdp.prune(handle, keep=())
    assert {name for name, _ in pruned.named_parameters()} >= {"layers.1.0.weight", "layers.1.0.bias"}
    assert not [name for name, _ in pruned.named_parameters() if name.startswith("layers.0")]
    x = torch.randn(5, 4)
    with handle.without(["layers.0", "layers.1"]):
        torch.testing.assert_close(pruned(x), handle.model.eval()(x))


def test_a_handle_that_knows_nothing_cannot_be_pruned():
    with pytest.raises(rdp.ArgumentError, match="not known yet"):
        rdp.prune(rdp.attach(MLP()), keep=["layers.1"])
    handle = attached()
    handle.remove()
    with pytest.raises(rdp.AttachError, match="removed"):
        rdp.prune(handle, keep=["layers.1"])
