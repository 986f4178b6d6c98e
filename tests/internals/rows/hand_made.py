"""A branch whose program is written by hand: two modules, of which the second takes more than x, and a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rdp.branches import RowAxis
from rdp.discovery.records import Ref
from rdp.rows.arguments import Named, Outside, Rows
from rdp.rows.program import Operation, Program

WIDTH, FOLD = 3, 2


class Second(nn.Module):
    """Takes a mask with an entry for each row, a table that all rows share, and the number of entries of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, mask: Tensor, table: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        assert len(x) == entries
        return mask, self.norm(x) * mask.repeat_interleave(FOLD)[:, None] + table


class Net(nn.Module):
    """`x + second(tanh(first(x) * gain))`, where each row of the batch is two entries of x.

    Args:
        activation: In the place of tanh.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.first, self.second = nn.Linear(WIDTH, WIDTH), Second()
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def branch(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        h = self.activation(self.first(x) * self.gain)
        return self.second(h, mask, table=table, entries=len(h))[1]

    def forward(self, rows: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        x = rows.flatten(0, 1)
        return (x + self.branch(x, mask, table)).view_as(rows)


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `Net`."""
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, FOLD, WIDTH), (rows,), (WIDTH,)
    x, mask, table = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, mask, table


ROWS, ENTRIES = RowAxis(0), RowAxis(0, FOLD)


def program(**changes: Any) -> Program:
    """The branch of `Net`, found with two rows: value 0 is x, 4 is the result."""
    operations = (
        Operation("first", ((Ref(0),), {}), (1,)),
        Operation(torch.mul, ((Ref(1), Named("gain")), {}), (2,)),
        Operation(torch.tanh, ((Ref(2),), {}), (3,)),
        Operation(
            "second", ((Ref(3), Outside(ROWS, 2)), {"table": Outside(None, WIDTH), "entries": Rows(FOLD)}), (None, 4)
        ),
    )
    given = {
        "start": 0,
        "result": 4,
        "operations": operations,
        "axes": dict.fromkeys((0, 3, 4), ENTRIES),
        "shape": (2 * FOLD, WIDTH),
        "result_leaf": 1,
    }
    return Program(**given | changes)
