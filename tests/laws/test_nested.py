"""What lies inside a branch learns from the rows that the branch lets through, however branches were found or named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import rdp
from laws.training import loss

WIDTH = 4


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


class Net(nn.Module):
    """A stem, some parts, and a head."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Twice(Net):
    """A branch inside a branch."""

    named = ("outer", "inner")

    def __init__(self) -> None:
        super().__init__(inner=mlp(), outer=mlp())

    def body(self, x: Tensor) -> Tensor:
        h = x.tanh()
        return x + self.outer(h + self.inner(h))


class Thrice(Net):
    """Three levels, each with something of its own."""

    named = ("outer", "middle", "inner")

    def __init__(self) -> None:
        super().__init__(inner=mlp(), middle=mlp(), outer=mlp(), before=nn.Linear(WIDTH, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        h = self.before(x).tanh()
        k = h.sigmoid()
        return x + self.outer(h + self.middle(k + self.inner(k)))


class Within(Net):
    """The inner branch lies in the outer one's module."""

    named = ("outer", "outer.0.f")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    def __init__(self) -> None:
        super().__init__(outer=nn.Sequential(self.Block(), nn.Linear(WIDTH, WIDTH)))

    def body(self, x: Tensor) -> Tensor:
        return x + self.outer(x)


class Streams(Net):
    """RevNet: what g makes of f's sum lies on no branch of f's, since that sum goes on by itself."""

    named = ("f.0", "g.0", "f.1", "g.1")

    def __init__(self) -> None:
        super().__init__(f=nn.ModuleList(mlp() for _ in range(2)), g=nn.ModuleList(mlp() for _ in range(2)))

    def body(self, x: Tensor) -> Tensor:
        a, b = x, x.tanh()
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return a + b


class LastStream(Streams):
    """The same, where but one stream is read: the last f is inside g."""

    def body(self, x: Tensor) -> Tensor:
        a, b = x, x.tanh()
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return b


class SideBySide(Net):
    """A branch inside two others, and live if one of them is."""

    named = ("left", "right", "inner")

    def __init__(self) -> None:
        super().__init__(inner=mlp(), left=mlp(), right=mlp())

    def body(self, x: Tensor) -> Tensor:
        h = x.tanh()
        h = h + self.inner(h)
        return x + self.left(h) + self.right(h)


class Shared(Net):
    """A module that ends one branch inside another, and one that is not inside."""

    named = ("outer", "inner")

    def __init__(self, also_outside: bool = True) -> None:
        super().__init__(inner=mlp(), outer=mlp())
        self.also_outside = also_outside

    def body(self, x: Tensor) -> Tensor:
        h = x.tanh()
        x = x + self.outer(h + self.inner(h))
        return x + self.inner(x) if self.also_outside else x


class SharedTwice(Net):
    """Two shared branches, one inside the other in both places."""

    named = ("outer", "inner")

    def __init__(self) -> None:
        super().__init__(inner=mlp(), outer=mlp())

    def body(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = x.tanh()
            x = x + self.outer(h + self.inner(h))
        return x


class Vouched(Net):
    """The inner branch also feeds the output, which is no reason for who names it."""

    named = ("outer", "inner")

    def __init__(self) -> None:
        super().__init__(inner=mlp(), outer=mlp())

    def body(self, x: Tensor) -> Tensor:
        h = x.tanh()
        f = self.inner(h)
        return x + self.outer(h + f) + 0.1 * f


class Part(Net):
    """A part of a branch that is named too, and that would run on some rows only if the branch did."""

    named = ("f", "f.0")

    def __init__(self) -> None:
        super().__init__(f=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH)))

    def body(self, x: Tensor) -> Tensor:
        return x + self.f(x)


NETS = [Part, Twice, Thrice, Within, Streams, LastStream, SideBySide, Shared, SharedTwice, Vouched]


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(
    ("net", "named"),
    # Both streams of Streams are returned, so without the user's word its branches are refused.
    [(net, named) for net in NETS for named in (True, False) if named or net is not Streams],
)
@pytest.mark.filterwarnings("ignore::rdp.RdpWarning")
def test_frozen_is_what_no_row_reaches(net: type[Net], named: bool, mode: str) -> None:
    torch.manual_seed(0)
    model, x = net().double(), torch.randn(3, 3, dtype=torch.float64)
    settings = {"decay": "constant", "seed": 4, "example_inputs": x, "branches": net.named if named else None}
    frozen_in_part = 0
    with rdp.attach(model, 0.5, mode=mode, **settings) as handle:
        if named:
            assert {branch.name for branch in handle.branches} == set(net.named)
        for _ in range(24):
            model.zero_grad()
            loss(model(x)).backward()
            without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
            assert set(handle.frozen) == without, handle.masks
            frozen_in_part += 0 < len(without) < len(list(model.parameters()))
            handle.advance()
    assert frozen_in_part


@pytest.mark.parametrize("net", [Twice, Thrice, Within, SideBySide])
def test_rows_that_no_branch_passes_on_to_another_are_no_way_around(net: type[Net]) -> None:
    """The inner branch is in the graph then, with a gradient of zeros."""
    torch.manual_seed(0)
    model, x = net(), torch.randn(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        handle = rdp.attach(model, 0.3, decay="constant", branches=net.named, example_inputs=x)
        optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(24):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
        assert handle.check().ok


def test_a_branch_that_was_not_chosen_guards_nothing() -> None:
    """Its parameters learn through it, or with the branch that they lie in, even if that comes after it."""
    torch.manual_seed(0)
    model, x = Within().double(), torch.randn(2, 3, dtype=torch.float64)
    with rdp.attach(model, 0.5, decay="constant", branches=["outer"], example_inputs=x) as handle:
        (branch,) = handle.branches
        assert {name for name, _ in model.named_parameters() if name.startswith("outer.")} == set(branch.parameters)
    model.outer[1].weight = model.outer[0].f[0].weight  # now shared by both
    with rdp.attach(model, 0.5, decay="constant", branches=["outer.0.f"], example_inputs=x) as handle:
        assert set(handle.branches[0].parameters) == {"outer.0.f.0.bias", "outer.0.f.2.weight", "outer.0.f.2.bias"}
