"""Arguments of any kind: taken, or refused by a documented exception that shows the value; never a changed model."""

# ruff: noqa: PT017  (an exception is one of two right outcomes)
from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
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
    st.sampled_from([2**64, -(2**64), 10**400, float("nan"), float("inf"), -0.0, 1e-300]),
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
    "rate",
    "mode",
    "decay",
    "sampling",
    "freeze",
    "scale_by_keep",
    "phases",
    "branches",
    "example_inputs",
    "native",
    "compute",
    "seed",
    "process_group",
]


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
    assert not handle._run.optimizers


def trained() -> tuple[torch.nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    handle = CASE.attach(model)
    for step in range(2):  # in the middle of a FREEZE step
        model(model.rows(3, step))
        if not step:
            handle.advance()
    return model, handle


@pytest.mark.parametrize("found", [True, False], ids=["found", "not_found_yet"])
@given(st.data())
def test_load_state_dict(found, data):
    model, handle = trained()
    state = copy.deepcopy(handle.state_dict())
    if not found:
        handle.remove()
        handle = CASE.attach(model)
    key = data.draw(st.sampled_from([*state, "unknown"]))
    value = data.draw(
        st.one_of(
            ANYTHING,
            st.lists(st.lists(NUMBERS, min_size=2, max_size=3), max_size=2),
            st.sampled_from([torch.zeros(3, 2), torch.ones(2, 3), torch.ones(1, 4, dtype=torch.bool), "missing"]),
        )
    )
    if isinstance(value, str) and value == "missing":
        state.pop(key, None)
    else:
        state[key] = value
    before = copy.deepcopy(handle.state_dict())
    weights = copy.deepcopy(model.state_dict())
    try:
        handle.load_state_dict(state)
    except rdp.StateError as error:
        assert key in str(error) or (key == "branches" and "rates" in str(error))
        assert identical(handle.state_dict(), before)
    else:
        try:
            model(model.rows(3, 5))
        except rdp.StateError as error:  # there were no branches to compare with before
            assert not found
            assert key in str(error)
        else:
            assert handle.phase in Phase
            handle.advance()
            model(model.rows(2, 6))
    assert identical(dict(model.state_dict()), dict(weights))


@given(ANYTHING)
def test_load_state_dict_of_no_state(value):
    _, handle = trained()
    before = copy.deepcopy(handle.state_dict())
    with pytest.raises(rdp.StateError, match="no state of a ResidualDropPath handle"):
        handle.load_state_dict(value)
    assert identical(handle.state_dict(), before)
