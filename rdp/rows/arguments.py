"""Recorded arguments of calls: what stands in them for tensors and row counts, and comparing them with actual ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rdp.branches import RowAxis
from rdp.discovery.records import Ref
from rdp.trees import Path, Placeholder

Leaves = Mapping[Path, Any]
"""The arguments of a call, by the keys that lead to each."""


@dataclass(frozen=True, slots=True)
class Rows(Placeholder):
    """Stands for an integer: this many for each row."""

    each: int


@dataclass(frozen=True, slots=True)
class Named(Placeholder):
    """Stands for a parameter or buffer of the model."""

    name: str


@dataclass(frozen=True, slots=True)
class Outside(Placeholder):
    """Stands for a tensor from outside of the branch, such as an attention mask; `rows` if it has one entry a row."""

    rows: RowAxis | None
    length: int
    """Of its first axis, when the branch was found with a batch of two."""


def as_recorded(recorded: Leaves, actual: Leaves, rows: int, given_rows: int) -> bool:
    """Are `actual` arguments of the form of `recorded` ones?

    Args:
        recorded: With placeholders.
        actual: What the model passes.
        rows: The number of rows of the batch, which tensors from outside of the branch have.
        given_rows: The number of rows that the branch is run on.
    """
    for path, leaf in recorded.items():  # and no generator, for which a compiler takes more steps
        if path not in actual or not _fits(leaf, actual[path], rows, given_rows):
            return False
    return len(actual) == len(recorded)


def _fits(recorded: Any, actual: Any, rows: int, given_rows: int) -> bool:
    if isinstance(recorded, (Ref, Named)):
        return isinstance(actual, Tensor)
    if isinstance(recorded, Outside):
        return isinstance(actual, Tensor) and _follows_batch(recorded, actual, rows)
    if isinstance(recorded, Rows):
        return bool(actual == recorded.each * given_rows)
    return type(actual) is type(recorded) and bool(actual == recorded)


def _follows_batch(recorded: Outside, actual: Tensor, rows: int) -> bool:
    """Has the tensor a row axis just where the recorded one had it?"""
    if recorded.rows is not None:
        axis = recorded.rows.axis
        return actual.dim() > axis and actual.shape[axis] == rows * recorded.rows.fold
    if actual.dim() == 0 or actual.shape[0] in (1, recorded.length):
        return True
    return actual.shape[0] % rows != 0
