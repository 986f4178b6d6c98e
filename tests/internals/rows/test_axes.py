"""Where a tensor has its rows, seen on the shapes that it has for two rows and for one."""

from __future__ import annotations

import pytest
from laws.architectures import FoldedMLP
from torch import nn

import rdp
from rdp.branches import RowAxis
from rdp.rows.axes import row_axis


@pytest.mark.parametrize(
    ("pair", "single", "expected"),
    [
        ((2, 5), (1, 5), RowAxis(0, 1)),
        ((5, 2), (5, 1), RowAxis(1, 1)),
        ((8, 5), (4, 5), RowAxis(0, 4)),  # four windows of a row
        ((2,), (1,), RowAxis(0, 1)),
        ((2, 5), (2, 5), None),  # the same for every batch
        ((2, 2), (1, 1), None),  # each row beside each other
        ((3, 5), (1, 5), None),
        ((2, 5), (5,), None),
        ((), (), None),
    ],
)
def test_the_axis_that_halves_holds_the_rows(pair, single, expected):
    assert row_axis(pair, single) == expected


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_entries_that_no_numbers_tell_apart_are_looked_at_with_other_numbers_once(blocks):
    model = FoldedMLP(blocks)
    for p in model.body.parameters():
        nn.init.zeros_(p)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(3, 0))
    assert len(calls) < 30
