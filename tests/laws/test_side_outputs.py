"""A module of a branch that makes something else, too, which is used outside with all rows, is not cut to some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rdp

WIDTH = 4


class Both(nn.Module):
    """Returns what it makes of x and what it makes of c, in a container."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.of_x, self.of_c, self.kind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), kind

    def forward(self, x: Tensor, c: Tensor) -> object:
        made = {"x": self.of_x(x) + self.of_c(c).tanh(), "c": self.of_c(c)}
        return made if self.kind is dict else tuple(made.values())


class Net(nn.Module):
    """Two blocks that end in `f`."""

    def __init__(self, kind: type = tuple) -> None:
        super().__init__()
        self.both = nn.ModuleList(Both(kind) for _ in range(2))
        self.fs = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for both, f in zip(self.both, self.fs, strict=True):
            x = self.block(x, c, both, f)
        return self.head(x)


class Gate(Net):
    """The other one is a gate."""

    def block(self, x: Tensor, c: Tensor, both: nn.Module, f: nn.Module) -> Tensor:
        h, gate = both(x, c)
        return x + gate * f(h)


class LaterInTheBranch(Net):
    """The other one is given to a later module of the branch."""

    class Second(nn.Sequential):
        def forward(self, h: Tensor, gate: Tensor) -> Tensor:
            return super().forward(h) * gate

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(self.Second(nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def block(self, x: Tensor, c: Tensor, both: nn.Module, f: nn.Module) -> Tensor:
        return x + f(*both(x, c))


class OnTheShortcut(Net):
    """The other one goes on beside the branch, out of a dictionary."""

    def __init__(self) -> None:
        super().__init__(dict)

    def block(self, x: Tensor, c: Tensor, both: nn.Module, f: nn.Module) -> Tensor:
        made = both(x, c)
        return (x + f(made["x"])) * (1 + made["c"]).tanh()


class ForTheNextBlock(Net):
    """The other one is used by the next block only, as T5's position bias."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h, bias = self.both[0](x, c)
        x = x + self.fs[0](h)
        return self.head(x + self.fs[1](self.both[1](x, bias)[0]))


@pytest.mark.parametrize("compute", ["auto", "dense"])
@pytest.mark.parametrize("net", [Gate, LaterInTheBranch, OnTheShortcut, ForTheNextBlock], ids=lambda net: net.__name__)
def test_freeze_is_the_plain_network_for_any_split_of_the_rows(net: type[Net], compute: str) -> None:
    torch.manual_seed(0)
    model, rows = net().double(), 4
    x, c = torch.randn(rows, WIDTH, dtype=torch.float64), torch.randn(rows, WIDTH, dtype=torch.float64)
    splits = set()
    with rdp.attach(model, 0.5, decay="constant", compute=compute, example_inputs=(x, c)) as handle:
        with handle.paused():
            plain = model(x, c)
        for _ in range(40):
            output = model(x, c)
            if handle.phase is rdp.Phase.FREEZE:
                torch.testing.assert_close(output, plain)
                splits.add(int(handle.masks[0].sum()))
            output.sum().backward()
            handle.advance()
    assert splits >= {1, 2, 3}


def test_the_reason_is_in_the_table_and_what_is_the_same_for_all_rows_is_none() -> None:
    x = torch.randn(3, WIDTH)
    with rdp.attach(Gate(), 0.5, decay="constant", example_inputs=(x, x)) as handle:
        assert {b.note for b in handle.branches} == {
            f"rows from `fs.{i}` on: `both.{i}` makes something else of the rows, too" for i in (0, 1)
        }
    with rdp.attach(OnTheShortcut(), 0.5, decay="constant", example_inputs=(x, torch.randn(WIDTH + 1)[1:])) as handle:
        assert [b.compute for b in handle.branches] == ["rows", "rows"]
