"""Where a tensor has its rows, seen on the shapes that it has for two rows and for one."""

from __future__ import annotations

import pytest

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
