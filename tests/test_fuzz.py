"""Arguments and states of any kind: taken, or refused by a documented exception; never a changed model or handle."""

# ruff: noqa: PT017  (an exception is one of two right outcomes)
from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import anatomy, identical

import rdp
from rdp import Phase

CASE = Case(BlockMLP, (("plain", "norm"),), rate=0.6, decay="constant", seed=2)

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([2**64, -(2**64), 2**24, 2**31, 2**32, 2**62, 10**400, float("nan"), float("inf"), -0.0, 1e-300]),
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=5),
    st.sampled_from(["row", "batch", "linear", "constant", "fixed", "bernoulli", "off", "error", "auto", "ghost"]),
    st.lists(NUMBERS, max_size=3),
    st.tuples(st.sampled_from([*Phase, "drop", None])),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    st.sampled_from([object(), torch.nn.Linear, len, torch.zeros(2), b"row", 1j, {1, 2}]),
)
ARGUMENTS = [
    "rate", "mode", "decay", "sampling", "freeze", "scale_by_keep", "phases", "branches", "example_inputs", "native",
    "compute", "seed", "process_group",
]  # fmt: skip


def shows(text: str, value: object) -> bool:
    """Is the value, or one of those it is made of, in the message?"""
    parts = list(value) if isinstance(value, (list, tuple, set, dict, torch.Tensor)) else []
    names = [part.name for part in parts if isinstance(part, Phase)]
    candidates = [repr(value)[:100], str(value)[:100], type(value).__name__, *map(repr, parts), *names]
    if hasattr(value, "__len__") and not len(value):
        return "empty" in text or "nothing" in text or repr(value) in text or f"got {type(value).__name__}" in text
    return any(candidate in text for candidate in candidates) or (isinstance(value, torch.Tensor) and "shape" in text)


@pytest.mark.parametrize("argument", ARGUMENTS)
@given(value=ANYTHING)
def test_attach(argument, value):
    model = CASE.model()
    before = anatomy(model)
    try:
        handle = rdp.attach(model, **{argument: value})
    except rdp.RdpError as error:
        assert isinstance(error, (rdp.ArgumentError, rdp.BranchError))
        assert argument in str(error)
        assert shows(str(error), value), str(error)
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError):
        # A tensor or a dict that the model cannot take: the model's own words say more than ours could.
        assert argument == "example_inputs"
        assert isinstance(value, (torch.Tensor, dict))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rdp.RdpWarning)
            for _ in range(2):
                try:
                    model(model.rows(3, 0)).sum().backward()
                except (rdp.BranchError, TypeError):
                    assert callable(value), "only a predicate may choose nothing, or not be one"
                handle.advance()
        handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
    assert anatomy(model) == before


@given(ANYTHING)
def test_attach_to_what_is_no_model(value):
    with pytest.raises(rdp.ArgumentError, match=r"must be a torch\.nn\.Module") as caught:
        rdp.attach(value)
    assert type(value).__name__ in str(caught.value)


@given(ANYTHING)
def test_wrap(value):
    model = CASE.model()
    handle = CASE.attach(model)
    before = anatomy(model)
    with pytest.raises(rdp.ArgumentError, match=r"torch\.optim\.Optimizer") as caught:
        handle.wrap(value)
    assert type(value).__name__ in str(caught.value)
    assert anatomy(model) == before
    assert handle.check().facts[2].startswith("0 wrapped optimizers")


# -- states -----------------------------------------------------------------------------------------------------------


def trained(model: torch.nn.Module, sampling: str) -> rdp.ResidualDropPath:
    """A handle in the middle of a FREEZE step, in whose state no list is empty."""
    handle = CASE.attach(model, sampling=sampling, example_inputs=model.rows(2, 0))
    for step in range(2):
        for k in range(2):
            model(model.rows(3 + k, 2 * step + k)).sum().backward()
        if not step:
            handle.advance()
            model.zero_grad()
    return handle


@functools.cache
def shared(sampling: str) -> tuple[torch.nn.Module, rdp.ResidualDropPath]:
    """The same for every state that is refused: it must not have changed."""
    model = CASE.model()
    return model, trained(model, sampling)


STATES = {sampling: trained(CASE.model(), sampling).state_dict() for sampling in ("bernoulli", "fixed")}
MISSING = object()
STRANGE = st.one_of(
    ANYTHING,
    st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.lists(NUMBERS, min_size=1, max_size=3), max_size=3),
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=2),
    st.sampled_from([torch.zeros(3, 2), torch.ones(1, 4, dtype=torch.bool), ["body.0.fc2"], ["drop"], MISSING]),
)


def paths(value: Any) -> list[tuple[int, ...]]:
    """Where there is something in a nested list."""
    if not isinstance(value, list):
        return [()]
    return [(), *((i, *path) for i, item in enumerate(value) for path in paths(item))]


def with_change(value: Any, path: tuple[int, ...], new: Any) -> Any:
    """A nested list with another item; one item less, for `MISSING`."""
    if not path:
        return new
    changed = list(value)
    if path[1:] or new is not MISSING:
        changed[path[0]] = with_change(value[path[0]], path[1:], new)
    else:
        del changed[path[0]]
    return changed


@pytest.mark.parametrize("key", [*STATES["fixed"], "unknown"])
@given(st.sampled_from(list(STATES)), st.booleans(), st.data())
def test_every_value_of_a_state_may_be_damaged_anywhere(key, sampling, found, data):
    """It is refused by an error that names the key, and nothing has changed; or training goes on from it."""
    state = copy.deepcopy(STATES[sampling])
    path, new = data.draw(st.sampled_from(paths(state.get(key)))), data.draw(STRANGE)
    if new is MISSING and not path:
        state.pop(key, None)
    else:
        state[key] = with_change(state.get(key), path, new)
    if found:
        model, handle = shared(sampling)
    else:
        model = CASE.model()
        handle = CASE.attach(model, sampling=sampling)
    before, frozen, masks = copy.deepcopy(handle.state_dict()), handle.frozen, handle.masks.tolist()
    try:
        handle.load_state_dict(state)
    except rdp.StateError as error:
        # Of two that do not fit each other, either may be the damaged one.
        others = {"branches": "rates", "version": "forwards"}
        assert key in str(error) or others.get(key, key) in str(error)
        assert identical(handle.state_dict(), before)
        assert (handle.frozen, handle.masks.tolist()) == (frozen, masks)
    else:
        shared.cache_clear()
        model.zero_grad()
        try:
            model(model.rows(3, 5)).sum().backward()
        except rdp.StateError as error:  # there were no branches to compare with before
            assert not found
            assert key in str(error)
        else:
            handle.advance()
            model(model.rows(2, 6))
    assert identical(dict(model.state_dict()), dict(CASE.model().state_dict()))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2),
        "missing",
        [[0, 3], [0, 3]],
        [[2**32 - 1, 3], [2**32, 3]],
        2**62 - 1,
        2**64 - 1,
        True,
        float("nan"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", STATES["fixed"])
@pytest.mark.parametrize("nested", [False, True])
def test_no_damage_is_any_other_error(key, value, nested):
    """Values at the bounds of what is sound, in every place."""
    _, handle = shared("bernoulli")
    before = copy.deepcopy(handle.state_dict())
    for path in paths(before[key])[nested:]:
        try:
            handle.load_state_dict(before | {key: with_change(before[key], path, value)})
        except rdp.StateError:
            assert identical(handle.state_dict(), before)
        else:
            handle.load_state_dict(before)


@given(ANYTHING)
@example({})
def test_load_state_dict_of_no_state(value):
    _, handle = shared("bernoulli")
    before = copy.deepcopy(handle.state_dict())
    with pytest.raises(rdp.StateError, match="no state of a ResidualDropPath handle"):
        handle.load_state_dict(value)
    assert identical(handle.state_dict(), before)
