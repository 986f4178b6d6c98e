"""`rdp.options`: the arguments of `attach`, and the words in which each bad one is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rdp
from rdp.options import Options

SOUND = Options(
    rate=0.1,
    mode="row",
    decay="linear",
    sampling="bernoulli",
    freeze="output",
    scale_by_keep=False,
    phases=(rdp.Phase.DROP, rdp.Phase.FREEZE),
    branches=None,
    native="error",
    compute="auto",
    seed=0,
)


def test_what_attach_does_by_default():
    assert rdp.attach(nn.Linear(1, 1)).options == SOUND


@given(st.integers(0, 0) | st.floats(0, 1, exclude_max=True), st.integers(0, 2**64 - 1))
def test_every_probability_below_one_and_every_seed_of_64_bits_is_accepted(rate, seed):
    options = replace(SOUND, rate=rate, seed=seed)
    assert (options.rate, options.seed) == (rate, seed)


ONE_OF = {
    "mode": ("row", "batch"),
    "decay": ("linear", "constant"),
    "sampling": ("bernoulli", "fixed"),
    "freeze": ("output", "params"),
    "native": ("error", "off"),
    "compute": ("auto", "rows", "ghost", "dense"),
}


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in ONE_OF for choice in ONE_OF[name]])
def test_every_choice_is_accepted(name, choice):
    assert getattr(replace(SOUND, **{name: choice} | ({"mode": "batch"} if choice == "params" else {})), name) == choice


def refusal(**changes: Any) -> str:
    with pytest.raises(rdp.ArgumentError) as refused:
        replace(SOUND, **changes)
    return str(refused.value)


@pytest.mark.parametrize("name", ONE_OF)
@pytest.mark.parametrize("value", ["Row", "", None, 1, True])
def test_another_word_is_refused_with_the_choices(name, value):
    assert refusal(**{name: value}) == f"{name} must be {' or '.join(map(repr, ONE_OF[name]))}; got {value!r}"


@pytest.mark.parametrize("rate", [1, 1.0, -0.001, -1, math.nan, math.inf, True, False, "0.1", None])
def test_a_rate_that_is_no_probability_below_one_is_refused(rate):
    assert refusal(rate=rate) == f"rate must be a number in [0, 1), the probability of dropping; got {rate!r}"


@pytest.mark.parametrize("seed", [-1, 2**64, 0.0, True, False, "0", None])
def test_a_seed_that_is_no_64_bit_number_is_refused(seed):
    assert refusal(seed=seed) == f"seed must be an int in [0, 2**64); got {seed!r}"


@pytest.mark.parametrize("value", [None, 0, 1, "yes"])
def test_scale_by_keep_is_true_or_false(value):
    assert refusal(scale_by_keep=value) == f"scale_by_keep must be True or False; got {value!r}"


def test_phases_are_checked_too():
    assert refusal(phases=(rdp.Phase.FREEZE,)).startswith("phases ['FREEZE'] has FREEZE before any DROP")


def test_choices_that_exclude_each_other_are_refused_with_the_way_out():
    assert refusal(freeze="params") == (
        "freeze='params' needs mode='batch': with one mask a row, some rows of a batch freeze a parameter while others "
        "train it. Use mode='batch', or freeze='output'"
    )
    assert refusal(sampling="fixed", mode="batch") == (
        "sampling='fixed' needs mode='row': it drops a fixed number of rows of each branch, and batch mode drops all "
        "or none. Use mode='row', or sampling='bernoulli'"
    )


@pytest.mark.parametrize("branches", [None, ["a", "b"], ("a",), {"a"}, frozenset("a"), lambda name, module: True])
def test_branches_are_found_named_or_chosen(branches):
    options = replace(SOUND, branches=branches)
    assert options.branches is branches
    assert list(options.named) == ([] if branches is None or callable(branches) else list(branches))


@pytest.mark.parametrize("branches", [[], (), set()])
def test_an_empty_list_of_branches_is_refused(branches):
    assert refusal(branches=branches) == (
        f"branches is {branches!r}, which names nothing to gate. Leave it out to gate all that are found, or use "
        "rate=0 for plain training"
    )


def test_a_single_string_is_refused_with_the_list_that_was_meant():
    assert refusal(branches="layer") == "branches must be a list of names, not one string; write ['layer']"


@pytest.mark.parametrize("branches", [3, ["a", 1], [None], {"a": 1}, b"a", True])
def test_what_names_no_modules_is_refused(branches):
    expected = f"branches must be None, names of modules, or a function of (name, module); got {branches!r}"
    assert refusal(branches=branches) == expected
