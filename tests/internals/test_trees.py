"""The walker of containers: every tensor is found and can be replaced, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from rdp import trees


class Pair(NamedTuple):
    """What some models return."""

    first: object
    second: object


@dataclasses.dataclass
class Output:
    """What others return."""

    logits: Tensor
    extra: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: object


class Node:
    """Known to torch alone."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts


pytree.register_pytree_node(Node, lambda node: (list(node.parts), "context"), lambda parts, context: Node(*parts))


class Named(dict):
    """A mapping that is made of other arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def named(x: object) -> Named:
    made = Named("logits")
    made["x"] = x
    return made


def found(value: object) -> list[Tensor]:
    """The tensors of a nested container, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in found(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in found(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [tensor for item in vars(value).values() for tensor in found(item)]
    return []


def shape(value: object) -> object:
    """The container, with its types, in which every tensor is a dot."""
    if isinstance(value, Tensor):
        return "."
    if isinstance(value, dict):
        return type(value), [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), [shape(item) for item in vars(value).values()]
    return value


OUTPUTS = st.recursive(
    st.one_of(st.builds(torch.zeros, st.just(1)), st.sampled_from([None, "text", 3, Output, Pair])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Output, st.builds(torch.zeros, st.just(1)), inner),
    ),
    max_leaves=6,
)


@given(OUTPUTS, st.data())
def test_one_tensor_of_a_nested_output_is_replaced_and_nothing_else(output, data):
    before = found(output)
    assert list(map(id, trees.tensors(output))) == list(map(id, before))
    number = data.draw(st.integers(0, len(before)))  # the last stands for no tensor at all
    new = torch.ones(2)
    replaced = trees.with_tensor(output, number, new)
    if isinstance(output, Tensor):
        assert replaced is new
        return
    assert shape(replaced) == shape(output)
    assert [id(tensor) for tensor in found(replaced)] == [
        id(new if position == number else tensor) for position, tensor in enumerate(before)
    ]
    assert list(map(id, found(output))) == list(map(id, before)), "the output itself is left alone"


@given(OUTPUTS, st.data())
def test_leaves_given_by_their_keys_are_replaced_and_no_others(output, data):
    leaves = trees.leaves(output)
    new = {path: object() for path in data.draw(st.sets(st.sampled_from(list(leaves))))} if leaves else {}
    replaced = trees.with_leaves(output, new)
    assert list(trees.leaves(replaced)) == list(leaves)
    for path, leaf in trees.leaves(replaced).items():
        assert leaf is new.get(path, leaves[path])
    assert type(replaced) is type(output) or () in new
    assert new or replaced is output
    assert [id(leaf) for leaf in trees.leaves(output).values()] == [id(leaf) for leaf in leaves.values()], "left alone"


CONTAINERS = {
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "dict": lambda x: {"x": x},
    "mapping": lambda x: UserDict(x=x),
    "mapping made otherwise": named,
    "set": lambda x: {x},
    "slice": lambda x: slice(None, x),
    "named tuple": lambda x: Pair("first", x),
    "dataclass": Output,
    "frozen dataclass": Frozen,
    "known to torch": lambda x: Node("first", x),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(
    "replace",
    [
        lambda value, path, new: trees.with_tensor(value, 0, new),
        lambda value, path, new: trees.with_leaves(value, {path: new}),
        lambda value, path, new: trees.map_leaves(lambda leaf: new if leaf is trees.at(value, path) else leaf, value),
    ],
    ids=["with_tensor", "with_leaves", "map_leaves"],
)
def test_what_holds_the_replaced_tensor_is_a_new_container_of_its_kind_and_what_holds_others_is_the_same(kind, replace):
    old, other, new = torch.zeros(1), torch.zeros(1), torch.ones(2)
    first, second = CONTAINERS[kind](old), CONTAINERS[kind](other)
    path = next(path for path, leaf in trees.leaves((first, second)).items() if leaf is old)
    replaced, kept = replace((first, second), path, new)
    assert kept is second
    assert replaced is not first
    assert type(replaced) is type(first)
    assert [id(tensor) for tensor in trees.tensors(replaced)] == [id(new)]
    assert [id(tensor) for tensor in trees.tensors(first)] == [id(old)]
    assert len(trees.leaves(replaced)) == len(trees.leaves(first))


def test_a_mapping_that_is_made_of_other_arguments_keeps_its_attributes():
    assert trees.with_tensor(named(torch.zeros(1)), 0, torch.ones(1)).name == "logits"


def test_a_field_that_has_no_value_stays_without_one():
    @dataclasses.dataclass
    class Partial:
        logits: Tensor
        loss: Tensor = dataclasses.field(init=False)

    partial, new = Partial(torch.zeros(2)), torch.ones(2)
    for replaced in (trees.with_tensor(partial, 0, new), trees.with_leaves(partial, {("logits",): new})):
        assert replaced.logits is new
        assert not hasattr(replaced, "loss")


class Word(str):
    """Text, though it has items."""


@dataclasses.dataclass
class Stand(trees.Placeholder):
    """Stands for something else, though it is a dataclass."""

    x: object


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, {(): 5}),
        ((1, [2, {"a": "text"}]), {(0,): 1, (1, 0): 2, (1, 1, "a"): "text"}),
        (slice(1, None), {("start",): 1, ("stop",): None, ("step",): None}),
        (Output(None, (3,)), {("logits",): None, ("extra", 0): 3}),
        (MappingProxyType({"a": 1}), {("a",): 1}),
        (([], {}, (), 4), {(3,): 4}),
        (Word("ab"), {(): "ab"}),
        (Output, {(): Output}),
    ],
)
def test_leaves_come_in_order_by_the_keys_that_lead_to_them(value: Any, expected: dict[trees.Path, Any]):
    assert trees.leaves(value) == expected
    assert list(trees.leaves(value)) == list(expected)


def test_what_stands_for_something_else_is_a_leaf_whatever_it_holds():
    stand = Stand(torch.zeros(1))
    assert trees.leaves([stand]) == {(0,): stand}
    assert list(trees.tensors(stand)) == []
    assert trees.map_leaves(lambda leaf: leaf is stand, (stand,)) == (True,)


def test_leaves_are_changed_in_copies_and_where_none_changes_nothing_is_copied():
    value = {"a": [1, 2], "b": (3, [4]), "c": []}
    assert trees.map_leaves(lambda leaf: leaf * 10 if leaf > 2 else leaf, value) == {
        "a": [1, 2],
        "b": (30, [40]),
        "c": [],
    }
    assert value == {"a": [1, 2], "b": (3, [4]), "c": []}
    assert trees.map_leaves(lambda leaf: leaf, value) is value
    assert trees.map_leaves(lambda leaf: -leaf, 7) == -7
