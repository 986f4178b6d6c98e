"""What a forward of one row has in common with the same of two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdp.branches import RowAxis
from rdp.discovery.graph import Graph
from rdp.discovery.trace import Trace
from rdp.rows.twins import Twins


class Layer(nn.Module):
    """Computes one row in another way, but not what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x)) if len(x) > 1 else torch.sin(torch.cos(self.fc(x)))
        return h + 1


class Model(nn.Module):
    """Makes copies of one row, or of two, or neither, and has a loss that is another one for one row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(4)[None]
        if len(x) != len(positions):
            positions = positions.expand(len(x), -1)
        x = self.first(x.t().contiguous().t() + positions)
        y = self.second(x.t().contiguous().relu().t())
        return (y.square() if len(x) > 1 else y.abs()).sum(-1)


def graph(model: nn.Module, rows: int) -> Graph:
    return Graph(Trace(model).run((torch.randn(rows, 4),), {}))


def test_values_are_told_by_what_they_are_made_of():
    model = Model()
    pair, single = graph(model, 2), graph(model, 1)
    assert len(pair.values) != len(single.values)
    twins = Twins(pair, single)

    def ops(index: int) -> tuple[str, str]:
        twin = twins.value(index)
        return pair.values[index].op, "" if twin is None else single.values[twin].op

    found = [ops(value.index) for value in pair.values]
    assert [pair for pair in found if pair[0] != pair[1]] == [
        ("expand", "__getitem__"),  # of one row, there is nothing to expand
        ("contiguous", "t"),  # nor to copy
        ("tanh", ""),
        ("contiguous", "t"),
        ("tanh", ""),
        ("square", ""),
    ]
    for call in pair.trace.calls[1:]:
        assert twins.row_axis(call.outputs[0]) == RowAxis(0)
    assert not twins.alike(0)
    expand = next(value.index for value in pair.values if value.op == "expand")
    assert twins.shape(expand) == (1, 4)
