"""Whatever a model is called with: batch mode trains it, and row mode trains it or says what to do.

Never is an error raised in the place of a forward that works, which is not the library's own; and what a user passes
stays as it was.
"""

# ruff: noqa: PT017  (an exception is one of two right outcomes)
from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import rdp
from laws import forms
from laws.forms import Net, tensors
from laws.training import identical

BATCH_MODE = "mode='batch'"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def boxes(number: int) -> list[dict[str, Tensor]]:
    return [{"boxes": draw(i + 1, 4)} for i in range(number)]


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], int | str]] = {
    # The model, the arguments, and in row mode the number of rows or a part of the error.
    "a tensor": (lambda: Net(Net.rows), (draw(5, 4),), 5),
    "a graph": (forms.Graph, (draw(6, 4), torch.randint(2, 6, (2, 9))), "IndexError"),
    "images and targets": (forms.Detector, ([draw(3, 6, 4), draw(3, 5, 7), draw(3, 2, 2)], boxes(3)), 3),
    "a tuple of images": (forms.Detector, ((draw(3, 6, 4), draw(3, 6, 4)), boxes(2)), 2),
    "one image": (forms.Detector, ([draw(3, 6, 4)], boxes(1)), 1),
    "a list of dicts": (
        lambda: Net(lambda net, given: net.rows(torch.stack([one["x"].mean(0) for one in given]))),
        ([{"x": draw(7, 4), "height": i} for i in range(4)],),
        4,
    ),
    "sequences of one length": (
        lambda: Net(lambda net, given: net.rows(torch.stack(given))),
        ([draw(7, 4), draw(7, 4) + 1, draw(7, 4) + 2],),
        3,
    ),
    "sequences": (
        lambda: Net(lambda net, given: net.rows(nn.utils.rnn.pad_sequence(given, batch_first=True))),
        ([draw(7, 4), draw(9, 4), draw(3, 4)],),
        3,
    ),
    "crops": (forms.Crops, ([draw(5, 6, 4), draw(5, 6, 4) + 1, *(draw(5, 3, 4) + i for i in range(3))],), 5),
    "crops of one size": (forms.Crops, ([draw(5, 6, 4) + i for i in range(3)],), "it is not clear where"),
    "a nested tensor": (
        lambda: Net(lambda net, x: net.rows(x).values()),
        (torch.nested.nested_tensor([draw(2, 4), draw(5, 4), draw(3, 4)], layout=torch.jagged),),
        "a nested tensor",
    ),
    "a plain object": (
        lambda: Net(lambda net, given: net.rows(given.x)),
        (forms.Plain(draw(5, 4)),),
        "register_pytree",
    ),
    "an object that is written to": (lambda: Net(forms.write), (forms.Data(x=draw(5, 4)),), "in a Data"),
    "a registered object": (lambda: Net(lambda net, given: net.rows(given.x)), (forms.Registered(draw(5, 4)),), 5),
    "a dataclass": (lambda: Net(lambda net, given: net.rows(given.x)), (forms.Batch(draw(5, 4)),), 5),
    "a bank first": (forms.Bank, (draw(11, 4), draw(5, 4)), 5),
    "one number first": (forms.Tempered, (torch.ones(1), draw(5, 4)), 5),
    "texts": (
        lambda: Net(lambda net, texts: net.rows(torch.tensor([[float(len(text)), 1, 2, 3] for text in texts]))),
        (["a", "list", "of texts"],),
        3,
    ),
    "two towers": (forms.Towers, (draw(5, 4), draw(7, 4)), "rows='images'"),
    "three rows at least": (forms.Neighbours, (draw(5, 4),), "selected index k out of range"),
    "no single row in training": (forms.OneByHand, (draw(5, 4),), 5),
    "in training alone": (forms.InTraining, (draw(5, 4),), 5),
    "lazy modules": (forms.Lazy, (draw(5, 4),), 5),
}


def loss(output: Any) -> Tensor:
    return torch.stack([x.square().mean() for x in tensors(output) if x.requires_grad]).sum()


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Some models write to what they are given; torch has no gradients for copies of nested tensors."""
    return args if any(x.is_nested for x in tensors(args)) else copy.deepcopy(args)


def train(model: nn.Module, handle: rdp.ResidualDropPath, args: tuple[Any, ...], steps: int = 6) -> None:
    """Some steps in which nothing moves that is frozen, and after which all is sound."""
    model(*copied(args))  # lazy modules get their parameters
    optimizer = handle.wrap(SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1))
    frozen_ever = False
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(*copied(args))).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        frozen = handle.frozen
        optimizer.step()
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], before[name]) for name in frozen)
        assert any(not torch.equal(now[name], before[name]) for name in before)
        frozen_ever |= bool(frozen)
    assert frozen_ever or handle.options.mode == "row"
    assert handle.check().ok, str(handle.check())


@pytest.mark.parametrize(("mode", "at_attach"), [("row", True), ("row", False), ("batch", False)])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_inputs_trains_or_has_its_error(form, mode, at_attach):
    make, args, expected = FORMS[form]
    model = make()
    untouched = copy.deepcopy(args)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        try:
            handle = rdp.attach(
                model, 0.5, mode=mode, decay="constant", seed=3, example_inputs=args if at_attach else None
            )
            train(model, handle, args)
        except rdp.RdpError as error:
            assert mode == "row"
            assert isinstance(error, rdp.ArgumentError if at_attach else rdp.ForwardError)
            assert isinstance(expected, str), error
            assert re.search(expected, str(error)), error
            assert BATCH_MODE in str(error)
        else:
            assert len(handle.branches) == (6 if isinstance(model, forms.Towers) else 3)
            if mode == "row":
                assert handle.masks.shape[1] == expected
    assert all(map(torch.equal, map(values, tensors(args)), map(values, tensors(untouched))))


def values(x: Tensor) -> Tensor:
    return x.values() if x.is_nested else x


def test_the_argument_that_holds_the_rows_may_be_named():
    model = forms.Towers()
    handle = rdp.attach(model, 0.5, decay="constant", rows="texts", example_inputs=(draw(5, 4), draw(7, 4)))
    assert [branch.name for branch in handle.branches] == [f"texts.body.{i}.f" for i in range(3)]
    for args, kwargs in (((draw(5, 4), draw(3, 4)), {}), ((draw(5, 4),), {"texts": draw(3, 4)})):
        model(*args, **kwargs)
        assert handle.masks.shape == (3, 3)


@pytest.mark.parametrize(
    ("rows", "value", "words"),
    [
        ("image", draw(5, 4), ("'image'", "no argument", "images, texts")),
        (3, draw(5, 4), ("rows must be the name", "3")),
    ],
)
def test_a_wrong_name_lists_the_arguments(rows, value, words):
    with pytest.raises(rdp.ArgumentError) as caught:
        rdp.attach(forms.Towers(), rows=rows)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((draw(5, 4),), ("without it",)),
        ((draw(5, 4), 0.5), ("it holds 0.5", "first axis", "list or tuple")),
        ((draw(5, 4), {"a": draw(2, 4), "b": draw(3, 4)}), ("tensors of 2, 3 rows",)),
    ],
    ids=["missing", "number", "several lengths"],
)
def test_what_is_named_must_hold_rows(args, words):
    model = forms.Net(lambda net, images, texts=None: net.rows(images))
    model.forward = lambda images, texts=None: model.rows(images)  # type: ignore[method-assign]
    with pytest.raises(rdp.ArgumentError) as caught:
        rdp.attach(model, rows="texts", example_inputs=args)
    assert all(word in str(caught.value) for word in ("rows='texts'", *words)), caught.value


def test_lazy_modules_begin_with_the_parameters_of_a_plain_run():
    models = forms.Lazy(), forms.Lazy()
    for model, attached in zip(models, (True, False), strict=True):
        if attached:
            rdp.attach(model, 0.5)
        torch.manual_seed(5)
        model(draw(5, 4))
    ours, plain = (dict(model.state_dict()) for model in models)
    assert {name: x for name, x in ours.items() if "norm" in name}.keys() >= {"norm.running_mean"}
    assert identical(ours, plain)


# -- any pytree ------------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 1, 2, 3, 4, 5])
SHAPES = st.lists(SIZES, max_size=2).flatmap(lambda shape: st.sampled_from([shape, [*shape, 4], [*shape, 4]]))
LEAVES = st.one_of(
    SHAPES.map(lambda shape: draw(*shape) if shape else torch.tensor(0.5)),
    SHAPES.map(lambda shape: torch.ones(shape, dtype=torch.int64)),
    st.sampled_from([None, 2, 0.5, "text", True, object(), torch.float32, torch.Generator(), slice(1, 2), {1}]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
        inner.map(forms.Batch),
        inner.map(forms.Plain),
        inner.map(forms.Registered),
    ),
    max_leaves=5,
)


def features(x: Tensor) -> Tensor:
    """Rows of four numbers, from a tensor of any shape."""
    x = x.float()
    return x if x.shape[-1:] == (4,) else x.reshape(*x.shape[:1], -1).mean(-1, keepdim=True).expand(*x.shape[:1], 4)


def everything(given: Any) -> list[Tensor]:
    return list(tensors(given))


USES = {
    "the first tensor": lambda net, given: net.rows(features(everything(given)[0])),
    "the last tensor": lambda net, given: net.rows(features(everything(given)[-1])),
    "all in one": lambda net, given: net.rows(torch.cat([features(x).reshape(-1, 4) for x in tensors(given)])),
    "each by itself": lambda net, given: [net.rows(features(x)) for x in tensors(given)],
    "their sum": lambda net, given: net.rows(torch.stack([features(x) for x in tensors(given)]).sum(0)),
    "their number": lambda net, given: net.rows(torch.full((len(list(tensors(given))), 4), 0.5)),
    "the first argument": lambda net, given: net.rows(torch.stack([features(x) for x in given[0]])),
    "the last argument": lambda net, given: net.rows(features(given[-1])),
}


@given(
    st.lists(TREES, min_size=1, max_size=3),
    st.sampled_from(list(USES)),
    st.sampled_from(["row", "batch"]),
    st.booleans(),
)
def test_any_pytree_of_inputs(args, use, mode, at_attach):
    """A forward that works by itself trains, or the library says why not; one that does not raises what it raises."""
    model, plain = (Net(lambda net, *given: USES[use](net, given)) for _ in range(2))
    try:
        expected, own = list(tensors(plain(*args))), None
    except Exception as error:
        expected, own = [], error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rdp.RdpWarning)
        try:
            handle = rdp.attach(model, 0.5, mode=mode, example_inputs=tuple(args) if at_attach else None)
            model(*args)
            handle.advance()
            found = list(tensors(model(*args)))  # FREEZE leaves the output as it is
        except rdp.RdpError as error:
            looked = isinstance(error, rdp.BranchError) and "no residual branch" in str(error)
            assert mode == "row" or own is not None or looked, error
            assert own is None or not at_attach or isinstance(error, rdp.ArgumentError | rdp.ForwardError), error
        except Exception as error:
            assert not at_attach
            assert type(error) is type(own), error
        else:
            assert own is None
            assert len(found) == len(expected)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, equal_nan=True)
