"""What a model is called with: copies that a forward may write to, and where its rows are, so that some can be taken.

Nobody says which of the lengths in the inputs is that of the batch. Each that could be is a candidate here; which of
them it is, forwards tell (`rows/sizes.py`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.calls import Inputs, argument_names, by_name, given_as
from rdp.errors import ForwardError, formed, listed
from rdp.trees import Path

_CANDIDATES = 8


def fresh(inputs: Inputs) -> Inputs:
    """A copy of the inputs for a forward that may write to them, or to objects of unknown kinds that hold some.

    What is one tensor in two places stays one: attention is computed otherwise where query and key are the same.
    """
    memo: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in memo:
                memo[id(leaf)] = leaf.detach().clone()
            return memo[id(leaf)]
        if not trees.is_opaque(leaf):
            return leaf
        for held in trees.held(leaf):
            if isinstance(held, nn.Module):
                memo[id(held)] = held  # a teacher, say, is no input
            elif isinstance(held, Tensor):
                copied(held)
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        try:
            return copy.deepcopy(leaf, memo)
        except Exception:  # a lock, say, or an open file, which a forward will hardly write to
            if isinstance(leaf, Iterator):
                raise ForwardError(
                    f"the model was called with a {type(leaf).__name__}, which the forward that looks for branches "
                    "would use up; pass a list"
                ) from None
            return leaf

    copies: Inputs = trees.map_leaves(copied, inputs)
    return copies


@dataclass(frozen=True)
class Rows:
    """Where the rows of a model's inputs are.

    Attributes:
        names: Of the arguments that are given by position.
        places: Where they can be counted: the name, or number, of an argument and the keys that lead on from there, to
            a tensor with rows along its first axis, or to a list with a row an item.
        of_lists: Are they items of lists, too?
    """

    names: tuple[str, ...]
    places: tuple[Path, ...]
    of_lists: bool = False

    def count(self, inputs: Inputs) -> int | None:
        """The number of rows of these inputs; None if there are none where they should be."""
        for argument, *path in self.places:
            value = trees.at(given_as(self.names, inputs, argument), path)
            if isinstance(value, Tensor) and value.dim():
                return value.shape[0]
            if isinstance(value, (list, tuple)):
                return len(value)
        return None

    def take(self, inputs: Inputs, rows: int) -> Inputs:
        """The first `rows` rows, repeated where too few, of every tensor, or list, that has as many as there are.

        Items of a list that are of different sizes would be padded to others together than alone: the first one, turned
        around, stands for the further ones.
        """
        args, kwargs = inputs
        size = self.count(inputs) or 0

        def is_cut(value: Any) -> bool:
            return self.of_lists and _is_list(value) and len(value) == size > 0

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _some(value, rows) if not value.is_nested and value.shape[:1] == (size,) else value
            if not is_cut(value):
                return value
            alike = size >= rows and len({_shapes(item) for item in value[:rows]}) == 1
            return type(value)(value[:rows] if alike else [value[0], *(_turned(value[0]) for _ in range(rows - 1))])

        return (
            tuple(trees.map_leaves(cut, value, is_cut) for value in args),
            {name: trees.map_leaves(cut, value, is_cut) for name, value in kwargs.items()},
        )

    def __str__(self) -> str:
        argument, *inner = self.places[0]
        what = "items" if self.of_lists else "entries of the first axis"
        return f"the {what} of {'what is in ' if inner else ''}{_named(argument)}"


def candidates(model: nn.Module, inputs: Inputs, named: str | None = None) -> dict[Rows, int]:
    """Everything that could be the rows of these inputs, with how many there would be.

    Args:
        model: Whose forward is called with them.
        inputs: Its arguments.
        named: The argument that holds the rows, if that is known.

    Raises:
        ValueError: If the argument that is named is not given, or holds nothing that could have rows.
    """
    names, _ = argument_names(model)
    given = by_name(names, inputs)
    tensors: dict[int, list[Path]] = {}
    lists: dict[int, list[Path]] = {}
    weights: Counter[int] = Counter()
    for argument, value in given.items():
        for path, one in _lengths(value):
            size = len(one)
            (tensors if isinstance(one, Tensor) else lists).setdefault(size, []).append((argument, *path))
            weights[size] += 1 if isinstance(one, Tensor) else size
    if named is not None:
        size = _named_length(named, given)
        here = tuple(p for p in (*tensors.get(size, ()), *lists.get(size, ())) if p[0] == named)
        of_lists = [True] if _is_list(given[named]) else [False, True] if size in lists else [False]
        places = ((named,),) if isinstance(given[named], Tensor) or _is_list(given[named]) else here
        return {Rows(names, places, items): size for items in of_lists}
    found: dict[Rows, int] = {}
    for size, _ in weights.most_common(_CANDIDATES):
        if size in tensors:
            found[Rows(names, tuple(tensors[size]))] = size
        if size in lists:
            found[Rows(names, (*lists[size], *tensors.get(size, ())), of_lists=True)] = size
    return found


def _lengths(value: Any) -> Iterator[tuple[Path, Tensor | Sequence[Any]]]:
    """What could have rows in an argument: tensors, and lists of tensors, of what holds some, or of texts."""
    if isinstance(value, Tensor):
        if value.dim() and not value.is_nested:  # whose rows cannot be masked
            yield (), value
        return
    if _is_list(value) and value and (any(True for _ in trees.tensors(value)) or isinstance(value[0], str)):
        yield (), value
    for key, item in trees.items(value).items():
        for path, one in _lengths(item):
            yield (key, *path), one


def _named_length(named: str, given: Mapping[object, Any]) -> int:
    if named not in given:
        raise ValueError(f"rows={named!r}, but the model was called without it")
    value = given[named]
    if _is_list(value) and value:
        return len(value)
    sizes = {len(one) for _, one in _lengths(value) if isinstance(one, Tensor)}
    if len(sizes) != 1:
        what = f"tensors of {listed([*map(str, sorted(sizes))])} rows" if sizes else formed(value)
        raise ValueError(
            f"rows={named!r} must name a tensor with a row an entry of its first axis, a list or tuple with a row an "
            f"item, or a container of such tensors, all of one length; it holds {what}"
        )
    return sizes.pop()


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and type(value) in (list, tuple)


def _some(tensor: Tensor, rows: int) -> Tensor:
    size = tensor.shape[0]
    # index_select copies: the model may write to its input, and a slice of the caller's would show it.
    return tensor.detach().index_select(0, torch.arange(rows, device=tensor.device) % size)


def _shapes(item: Any) -> tuple[object, ...]:
    leaves = trees.leaves(item).items()
    return tuple((path, leaf.shape if isinstance(leaf, Tensor) else type(leaf)) for path, leaf in leaves)


def _turned(item: Any) -> Any:
    """A copy with other numbers of the same kinds, in whatever it holds: each tensor back to front."""
    return trees.map_leaves(lambda x: x.detach().flip(0) if isinstance(x, Tensor) and x.dim() else x, item)


def _named(argument: object) -> str:
    return f"`{argument}`" if isinstance(argument, str) else f"argument {argument}"
