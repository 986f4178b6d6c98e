"""Recorded arguments of calls: what stands in them for tensors and row counts, and comparing them with actual ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rdp.branches import RowAxis

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a value of the trace."""

    value: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Stands for an integer: this many for each row."""

    each: int


@dataclass(frozen=True, slots=True)
class Named:
    """Stands for a parameter or buffer of the model."""

    name: str


@dataclass(frozen=True, slots=True)
class Outside:
    """Stands for a tensor from outside of the branch, such as an attention mask; `rows` if it has one entry a row."""

    rows: RowAxis | None
    length: int
    """Of its first axis, when the branch was found with a batch of two."""


class Absent:
    """Stands for an argument that the recorded call did not have."""


def leaves(arguments: Any) -> Iterator[Any]:
    """Everything in nested dicts, lists and tuples that is none of these."""
    if isinstance(arguments, (dict, list, tuple)):
        for item in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from leaves(item)
    else:
        yield arguments


def rebuild(recorded: Any, actual: Any, change: Callable[[Any, Any], Any]) -> Any:
    """`actual` with every leaf replaced by `change(its counterpart in recorded, leaf)`.

    Args:
        recorded: Recorded arguments; where they have no counterpart, `change` gets `Absent`.
        actual: Nested dicts, lists and tuples.
        change: Gives the new leaf.
    """
    if isinstance(actual, dict):
        known = recorded if isinstance(recorded, dict) else {}
        return {key: rebuild(known.get(key, Absent), item, change) for key, item in actual.items()}
    if isinstance(actual, (list, tuple)):
        known_items = list(recorded) if isinstance(recorded, (list, tuple)) else []
        known_items += [Absent] * (len(actual) - len(known_items))
        items = [rebuild(r, a, change) for r, a in zip(known_items, actual, strict=False)]
        return items if isinstance(actual, list) else tuple(items)
    if isinstance(actual, slice):
        parts = (actual.start, actual.stop, actual.step)
        known_slice = recorded if isinstance(recorded, slice) else slice(Absent, Absent, Absent)
        known_parts = (known_slice.start, known_slice.stop, known_slice.step)
        return slice(*rebuild(known_parts, parts, change))
    return change(recorded, actual)


def as_recorded(recorded: Any, actual: Any, rows: int, given_rows: int) -> bool:
    """Are `actual` arguments of the form of `recorded` ones?

    Args:
        recorded: With placeholders.
        actual: What the model passes.
        rows: The number of rows of the batch, which tensors from outside of the branch have.
        given_rows: The number of rows that the branch is run on.
    """
    if isinstance(recorded, dict):
        same_keys = isinstance(actual, dict) and actual.keys() == recorded.keys()
        return same_keys and all(as_recorded(item, actual[key], rows, given_rows) for key, item in recorded.items())
    if isinstance(recorded, (list, tuple)):
        same_length = isinstance(actual, (list, tuple)) and len(actual) == len(recorded)
        return same_length and all(as_recorded(r, a, rows, given_rows) for r, a in zip(recorded, actual, strict=True))
    if isinstance(recorded, Outside):
        return isinstance(actual, Tensor) and _follows_batch(recorded, actual, rows)
    if isinstance(recorded, (Ref, Named)):
        return isinstance(actual, Tensor)
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
