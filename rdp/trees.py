"""The one walker of nested containers: tensors in whatever a model takes or returns.

Containers are what torch's pytree knows (tuples, lists, dicts, and what others have registered, such as the outputs of
transformers), and further mappings, sets, slices and dataclasses. Anything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Path = tuple[object, ...]


class Placeholder:
    """Base of what stands in a container for something else: a leaf, though it may be a dataclass."""

    __slots__ = ()


_LEAVES = (Tensor, str, bytes, int, float, type(None), Placeholder)
_EMPTY = (Mapping, list, tuple, set)
_MOST = 100_000
"""How many things are looked at in an object: it may hold a whole data set."""


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in `value`, in order."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, _LEAVES):
        for item in value if isinstance(value, (list, tuple)) else items(value).values():
            yield from tensors(item)


def at(value: Any, path: Sequence[object]) -> Any:
    """What these keys lead to; None where there is nothing."""
    for key in path:
        value = items(value).get(key)
    return value


def is_opaque(leaf: object) -> bool:
    """Is it an object of a kind that nobody has described, which may hold anything?"""
    return not isinstance(leaf, (*_LEAVES, *_EMPTY, type, FunctionType, ModuleType, nn.Module))


def held(leaf: object) -> Iterator[object]:
    """The tensors and modules that an opaque object holds, as far as its attributes show."""
    todo, seen = [leaf], set[int]()
    while todo and len(seen) < _MOST:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, nn.Module)):
            yield value
        elif is_opaque(value) or isinstance(value, _EMPTY):
            slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
            attributes = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
            todo.extend([*items(value).values(), *attributes.values()])


def leaves(value: object) -> dict[Path, Any]:
    """Every leaf in `value`, in order, by the keys that lead to it."""
    found: dict[Path, Any] = {}
    _find_leaves(value, (), found)
    return found


def map_leaves(change: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`value` with `change(leaf)` in the place of every leaf.

    Containers are copied where something in them changes; whatever has not changed is the very same object.

    Args:
        change: Returns what to put in the place of a leaf.
        value: Any container.
        is_leaf: Says which containers are to be taken for leaves.
    """
    is_one = isinstance(value, _LEAVES) or (is_leaf is not None and is_leaf(value))
    if is_one or not ((inside := items(value)) or isinstance(value, _EMPTY)):
        return change(value)
    new, changed = {}, {}
    for key, item in inside.items():
        new[key] = made = map_leaves(change, item, is_leaf)
        if _differ(made, item):
            changed[key] = made
    return _with_items(value, new, changed) if changed else value


def with_leaves(value: Any, new: Mapping[Path, Any]) -> Any:
    """`value` with others in the places of some leaves, given by the keys that lead to them, as `leaves` does."""
    if () in new:
        return new[()]
    if not new:
        return value
    below: dict[object, dict[Path, Any]] = {}
    for path, leaf in new.items():
        below.setdefault(path[0], {})[path[1:]] = leaf
    inside = items(value)
    changed = {key: with_leaves(inside[key], leaves_below) for key, leaves_below in below.items()}
    return _with_items(value, {**inside, **changed}, changed)


def tensor_at(value: Any, number: int) -> Tensor:
    """Tensor `number` of those that `tensors` yields; a tensor alone is the only one."""
    return value if isinstance(value, Tensor) else list(tensors(value))[number]


def with_tensor(value: Any, number: int, new: Tensor) -> Any:
    """`value` with another tensor in the place of tensor `number`, counted as `tensors` does."""
    numbers = itertools.count()

    def change(leaf: Any) -> Any:
        return new if isinstance(leaf, Tensor) and next(numbers) == number else leaf

    return new if isinstance(value, Tensor) else map_leaves(change, value)


def _find_leaves(value: object, path: Path, found: dict[Path, Any]) -> None:
    inside: Mapping[Any, Any] = {} if isinstance(value, _LEAVES) else items(value)
    if not inside and not isinstance(value, _EMPTY):
        found[path] = value
    for key, item in inside.items():
        _find_leaves(item, (*path, key), found)


def _differ(new: Any, old: Any) -> bool:
    """Are they two objects? Of containers, a compiler cannot tell."""
    return (isinstance(old, _EMPTY) and torch.compiler.is_compiling()) or new is not old


def items(value: Any) -> Mapping[Any, Any]:
    """The items of a container, with their keys; none of a leaf."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple, set)):
        numbered: dict[Any, Any] = {}
        for item in value:  # a compiler takes a third of the steps that it takes for `enumerate`
            numbered[len(numbered)] = item
        return numbered
    if isinstance(value, slice):
        return {"start": value.start, "stop": value.stop, "step": value.step}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if (node := pytree.SUPPORTED_NODES.get(type(value))) is not None:
        return dict(enumerate(node.flatten_fn(value)[0]))
    return {}


def _with_items(value: Any, inside: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """A container like `value` that holds `inside`, of which some items have changed."""
    if isinstance(value, (Mapping, list)):
        try:
            # And not `type(value)(...)`: a subclass may be made of other arguments. A compiler knows the method alone.
            copied = value.copy() if type(value) in (dict, list) else copy.copy(value)  # type: ignore[union-attr]
            for key, item in changed.items():
                copied[key] = item  # type: ignore[index]
        except TypeError:  # it is for reading alone
            return MappingProxyType({**inside})
        return copied
    parts = list(inside.values())
    if isinstance(value, slice):
        return slice(*parts)
    if isinstance(value, (tuple, set)):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value):
        replica = copy.copy(value)
        for name, item in changed.items():
            object.__setattr__(replica, name, item)  # it may be frozen
        return replica
    node = pytree.SUPPORTED_NODES[type(value)]
    return node.unflatten_fn(parts, node.flatten_fn(value)[1])


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
