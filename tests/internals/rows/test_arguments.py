"""Recorded arguments are told from calls of another form."""

from __future__ import annotations

import pytest
import torch

from rdp import trees
from rdp.branches import RowAxis
from rdp.discovery.records import Ref
from rdp.rows.arguments import Named, Outside, Rows, as_recorded

PER_ROW, SHARED = Outside(RowAxis(0, 1), 2), Outside(None, 7)
FOLDED, SECOND = Outside(RowAxis(0, 3), 6), Outside(RowAxis(1, 1), 7)
X = torch.zeros(4, 7)


@pytest.mark.parametrize(
    ("recorded", "actual", "expected"),
    [
        # plain values are compared with their type
        (1, 1, True), (1, 2, False), (1, True, False), (1.0, 1, False), (None, None, True), ("a", "a", True),
        # containers by the keys that lead to their leaves, in any order
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": 1}, {"a": 2}, False), ({"a": 1}, {}, False),
        ({"a": 1}, {"b": 1}, False), ({"a": 1}, {"a": 1, "b": 1}, False), ({"a": 1}, [1], False),
        ((1, 2), (1, 2), True), ((1, 2), [1, 2], True), ((1, 2), (1,), False), ((1, 2), (1, 2, 3), False),
        ((1, 2), (1, 3), False), ((1, 2), 1, False), (slice(0, 2), slice(0, 2), True), (slice(0, 2), slice(2), False),
        # tensors of the branch, and of the model, may be any
        (Ref(3), X, True), (Ref(3), 1, False), (Named("a"), X, True), (Named("a"), None, False),
        # numbers of rows are those of the rows that run
        (Rows(1), 2, True), (Rows(1), 4, False), (Rows(3), 6, True), (Rows(3), 12, False),
        # a tensor from outside has its rows where it had them
        (PER_ROW, torch.zeros(4, 7), True), (PER_ROW, torch.zeros(2, 7), False), (PER_ROW, torch.zeros(()), False),
        (PER_ROW, None, False), (FOLDED, torch.zeros(12), True), (FOLDED, torch.zeros(4), False),
        (SECOND, torch.zeros(7, 4), True), (SECOND, torch.zeros(4), False), (SECOND, torch.zeros(4, 7), False),
        # or none: of another length than the recorded one it must be no multiple of the rows
        (SHARED, torch.zeros(7, 5), True), (SHARED, torch.zeros(1, 5), True), (SHARED, torch.zeros(()), True),
        (SHARED, torch.zeros(4, 5), False), (SHARED, torch.zeros(8, 5), False), (SHARED, torch.zeros(9, 5), True),
        (SHARED, 7, False),
    ],
)  # fmt: skip
def test_calls_of_another_form_are_told_from_the_recorded_one(recorded, actual, expected):
    """In a batch of four rows, of which the branch runs on two."""
    for before, now in ((recorded, actual), (((recorded,), {"k": recorded}), ((actual,), {"k": actual}))):
        assert as_recorded(trees.leaves(before), trees.leaves(now), rows=4, given_rows=2) is expected
