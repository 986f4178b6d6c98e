"""Where rows are counted and taken, and copies that a forward may write to."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import rdp
from rdp.inputs import Rows, candidates, fresh


class Model(nn.Module):
    def forward(self, x, images=None, *more, **others):
        raise AssertionError("it is not called")


@dataclass
class Batch:
    x: Tensor


class Plain:
    def __init__(self, **attributes: object) -> None:
        self.__dict__ |= attributes


X = torch.arange(20.0).view(5, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((X,), {}, {"the entries of the first axis of `x`": 5}),
        ((X[:2],), {"images": X}, {f"the entries of the first axis of `{x}`": n for x, n in (("x", 2), ("images", 5))}),
        ((Batch(X), None, X), {}, {"the entries of the first axis of what is in `x`": 5}),
        (([X, X[:2]],), {}, {"the items of `x`": 2, "the entries of the first axis of what is in `x`": 5}),
        ((["a", "b", "c"], 3), {}, {"the items of `x`": 3}),
        ((None, None, X), {}, {"the entries of the first axis of argument 2": 5}),
        ((torch.tensor(1.0), Plain(x=X)), {}, {}),
    ],
)
def test_every_length_could_be_that_of_the_batch(args, kwargs, expected):
    found = candidates(Model(), (args, kwargs))
    assert {str(rows): size for rows, size in found.items()}.items() >= expected.items()
    assert set(found.values()) == set(expected.values())


def test_rows_are_counted_wherever_the_argument_is_given():
    rows = Rows(("x", "images"), (("images",),))
    for given in (((X, X[:3]), {}), ((X,), {"images": X[:3]}), ((X,), {"images": [X] * 3})):
        assert rows.count(given) == 3
    assert rows.count(((X,), {})) is None


def test_what_has_as_many_is_cut_and_too_few_are_repeated():
    rows = Rows(("x",), (("x",),))
    (x, other), kwargs = rows.take(((X, X[:3]), {"bias": X[0], "same": {"y": X + 1}}), 2)
    assert torch.equal(x, X[:2])
    assert torch.equal(kwargs["same"]["y"], X[:2] + 1)
    assert (other.shape, kwargs["bias"].shape) == ((3, 4), (4,))
    assert torch.equal(rows.take(((X[:1],), {}), 2)[0][0], X[[0, 0]])


def test_of_lists_items_are_taken_and_where_sizes_differ_the_first_one_turned_around():
    rows = Rows(("x",), (("x",),), of_lists=True)
    taken = rows.take((([X, X + 1, X[:2]],), {"labels": torch.arange(3)}), 2)
    assert torch.equal(torch.stack(taken[0][0]), torch.stack([X, X + 1]))
    assert taken[1]["labels"].tolist() == [0, 1]
    for items in ([X, X[:2]], [X]):
        first, second = rows.take(((items,), {}), 2)[0][0]
        assert torch.equal(first, X)
        assert torch.equal(second, X.flip(0))


def test_copies_are_of_everything_that_a_forward_could_write_to():
    teacher, lock, generator = nn.Linear(2, 2), threading.Lock(), torch.Generator()
    held = Plain(x=X, inner=Plain(x=X), teacher=teacher, y=[(X + 1).requires_grad_() * 2])
    (x, copied, locked, drawing), _ = fresh(((X, held, lock, generator), {}))
    assert x is not X
    assert torch.equal(x, X)
    assert copied.x is copied.inner.x is x, "what is one tensor stays one"
    assert copied.y[0] is not held.y[0]
    assert copied.teacher is teacher
    assert locked is lock
    torch.rand(2, generator=drawing)
    assert torch.equal(generator.get_state(), torch.Generator().get_state())


def test_what_a_forward_would_use_up_is_refused():
    with pytest.raises(rdp.ForwardError, match=r"generator.*pass a list"):
        fresh((((x for x in [X]),), {}))
