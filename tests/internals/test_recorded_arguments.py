"""Recorded arguments: what stands for tensors and row counts, put back, and told from calls of another form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rdp.branches import RowAxis
from rdp.discovery.arguments import Absent, Named, Outside, Ref, Rows, as_recorded, leaves, rebuild

PER_ROW, SHARED = Outside(RowAxis(0, 1), 2), Outside(None, 7)
FOLDED, SECOND = Outside(RowAxis(0, 3), 6), Outside(RowAxis(1, 1), 7)
X = torch.zeros(4, 7)


def paired(recorded: Any, actual: Any) -> list[tuple[Any, Any]]:
    """What `rebuild` shows its function, in order."""
    shown: list[tuple[Any, Any]] = []
    rebuild(recorded, actual, lambda r, a: shown.append((r, a)))
    return shown


def test_leaves_of_nested_arguments_come_in_order():
    nested = ((1, [2, {"a": 3, "b": (4,)}]), {"c": slice(0, 1), "d": None})
    assert list(leaves(nested)) == [1, 2, 3, 4, slice(0, 1), None]
    assert list(leaves(5)) == [5]


@pytest.mark.parametrize(
    ("recorded", "actual", "pairs"),
    [
        ({"a": 1, "b": 2}, {"b": 20, "a": 10}, [(2, 20), (1, 10)]),
        ({"a": 1}, {"a": 10, "b": 20}, [(1, 10), (Absent, 20)]),
        (3, {"a": 10}, [(Absent, 10)]),
        ((1, 2), (10, 20), [(1, 10), (2, 20)]),
        ([1], (10, 20), [(1, 10), (Absent, 20)]),
        ({"a": 1}, [10], [(Absent, 10)]),
        (slice(1, 2, 3), slice(10, 20, 30), [(1, 10), (2, 20), (3, 30)]),
        (1, slice(10, 20, 30), [(Absent, 10), (Absent, 20), (Absent, 30)]),
        (((1,), {"a": [2]}), ((10,), {"a": [20]}), [(1, 10), (2, 20)]),
    ],
)
def test_each_leaf_is_changed_beside_its_counterpart(recorded, actual, pairs):
    assert paired(recorded, actual) == pairs


@pytest.mark.parametrize("value", [(1, [2, {"a": (3,)}]), {"x": slice(1, None, 2)}, [], (), {}, 7])
def test_containers_are_rebuilt_as_they_are(value):
    rebuilt = rebuild(value, value, lambda r, a: a)
    assert rebuilt == value
    assert type(rebuilt) is type(value)


@pytest.mark.parametrize(
    ("recorded", "actual", "is_as_recorded"),
    [
        # plain values are compared with their type
        (1, 1, True), (1, 2, False), (1, True, False), (1.0, 1, False), (None, None, True), ("a", "a", True),
        # containers by their keys and lengths
        ({"a": 1}, {"a": 1}, True), ({"a": 1}, {"a": 2}, False), ({"a": 1}, {}, False), ({"a": 1}, {"b": 1}, False),
        ({"a": 1}, {"a": 1, "b": 1}, False), ({"a": 1}, [1], False),
        ((1, 2), (1, 2), True), ((1, 2), [1, 2], True), ((1, 2), (1,), False), ((1, 2), (1, 2, 3), False),
        ((1, 2), (1, 3), False), ((1, 2), 1, False),
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
def test_calls_of_another_form_are_told_from_the_recorded_one(recorded, actual, is_as_recorded):
    """In a batch of four rows, of which the branch runs on two."""
    assert as_recorded(recorded, actual, rows=4, given_rows=2) is is_as_recorded
    assert as_recorded(((recorded,), {"k": recorded}), ((actual,), {"k": actual}), 4, 2) is is_as_recorded
