"""Saved states: old, damaged and foreign ones are refused word by word, and change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP, LoopMLP
from laws.strategies import Case
from laws.training import loss
from torch import nn

import rdp
from rdp import Phase

CASE = Case(LoopMLP, (2,), rate=0.5, decay="constant", seed=7)


def attached(found: bool = True, **changes: Any) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    return model, CASE.attach(model, **({"example_inputs": model.rows(2, 0)} if found else {}) | changes)


def masks(model: nn.Module, handle: rdp.ResidualDropPath, rows: int) -> list[list[int]]:
    """Of a forward that is learnt from."""
    loss(model(model.rows(rows, 0))).backward()
    return handle.masks.int().tolist()


def states() -> dict[str, Any]:
    """Of a step of DROP and of one of FREEZE, each between two micro-batches."""
    model, handle = attached()
    masks(model, handle, 4)
    masks(model, handle, 3)
    drop = handle.state_dict()
    handle.advance()
    model.zero_grad()
    masks(model, handle, 5)
    return {"DROP": drop, "FREEZE": handle.state_dict()}


def test_a_state_is_plain_numbers_of_what_has_learnt():
    model, handle = attached()
    fresh = {
        "version": 4,
        "branches": ["layers.0", "layers.1"],
        "rates": [0.5, 0.5],
        "phases": ["drop", "freeze"],
        "mode": "row",
        "sampling": "bernoulli",
        "seed": 7,
        "rate": 0.5,
        "cycle_rate": 0.5,
        "factor": 1.0,
        "step_count": 0,
        "forwards": [],
        "replayed": [],
        "ranks": 1,
    }
    assert handle.state_dict() == fresh
    model(model.rows(4, 0))
    assert handle.state_dict() == fresh, "what is only run counts for nothing"
    drop, freeze = states().values()
    assert drop == fresh | {"forwards": [[0, 4], [1, 3]]}
    assert freeze == fresh | {"step_count": 1, "forwards": [[0, 5]], "replayed": [[0, 4], [1, 3]]}
    handle.state_dict()["forwards"].append([0, 1])
    assert handle.state_dict() == fresh, "it is a copy"


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(handle: rdp.ResidualDropPath, state: Any) -> str:
    """The message; nothing has changed."""
    before = copy.deepcopy(handle.state_dict())
    with pytest.raises(rdp.StateError) as error:
        handle.load_state_dict(state)
    assert handle.state_dict() == before
    return str(error.value)


DAMAGED = [
    ("branches", "a"), ("branches", ["a", 1]),
    ("rates", 0.5), ("rates", ["0.5"]), ("rates", []),
    ("seed", -1), ("seed", 2**64), ("seed", True), ("seed", 1.0), ("seed", None),
    ("rate", -0.1), ("rate", 1), ("rate", "0.5"), ("rate", None), ("rate", float("inf")),
    ("cycle_rate", -0.1), ("cycle_rate", 1.0), ("cycle_rate", True), ("cycle_rate", None), ("cycle_rate", [0.5]),
    ("factor", 1.5), ("factor", -1), ("factor", "1"), ("factor", False),
    ("step_count", -1), ("step_count", 2**62), ("step_count", False), ("step_count", "1"),
    ("forwards", None), ("forwards", [1]), ("forwards", [[0]]), ("forwards", [[0, 2, 2]]), ("forwards", [[0, -1]]),
    ("forwards", [[0, 1], [0, None]]), ("forwards", ((0, 1),)), ("forwards", [(0, 1)]), ("forwards", [[0, 2**24]]),
    ("replayed", 0), ("replayed", [[0, 2, 2]]), ("replayed", [[2**32, 2]]), ("replayed", [[0, True]]),
]  # fmt: skip


@pytest.mark.parametrize("phase", ["DROP", "FREEZE"])
@pytest.mark.parametrize(("key", "value"), DAMAGED, ids=str)
def test_a_damaged_value_is_named_and_nothing_is_loaded(key, value, phase):
    _, handle = attached(found=key != "rates")  # or it would be called another run's
    message = refused(handle, states()[phase] | {key: value})
    assert message == f"{key} in the state is damaged: {value!r}. Load another one"


def test_a_state_from_before_rates_could_change_goes_on_with_the_rate_of_its_run():
    model, handle = attached()
    twin, expected = attached()
    state = states()["FREEZE"]
    expected.load_state_dict(state)
    for key in ("rate", "cycle_rate", "factor"):
        del state[key]
    handle.load_state_dict(state | {"version": 3})
    assert handle.state_dict() == expected.state_dict()
    assert masks(model, handle, 3) == masks(twin, expected, 3)


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_another_stream_of_masks_is_refused_with_the_way_out(version):
    _, handle = attached()
    state = {key: value for key, value in states()["DROP"].items() if key != "version"}
    assert refused(handle, state | ({"version": version} if version > 1 else {})) == (
        f"the state has version {version}, whose masks are of a random stream that is not drawn any more. Resume with "
        "the release of rdp that saved it; or load model and optimizer without it, to go on with other masks"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0), ("seed", 2**64 - 1), ("step_count", 0), ("step_count", 2**62 - 1), ("forwards", []),
        ("forwards", [[2**32 - 1, 3]]), ("replayed", [[0, 1], [2**32 - 1, 3]]),
    ],
)  # fmt: skip
def test_the_last_sound_values_are_loaded(key, value):
    model, handle = attached()
    handle.load_state_dict(states()["FREEZE"] | {key: value})
    assert handle.state_dict()[key] == value
    masks(model, handle, 2)


@pytest.mark.parametrize("version", [5, -1, "4", True, None])
def test_a_version_that_is_not_known_is_named(version):
    _, handle = attached()
    message = f"the state has version {version!r}, this library reads up to 4; update it"
    assert refused(handle, states()["DROP"] | {"version": version}) == message


@pytest.mark.parametrize(
    ("change", "key", "there", "here"),
    [
        ({"phases": (Phase.DROP,)}, "phases", "['drop']", "['drop', 'freeze']"),
        ({"mode": "batch"}, "mode", "'batch'", "'row'"),
        ({"sampling": "fixed"}, "sampling", "'fixed'", "'bernoulli'"),
        ({"rate": 0.25}, "rates", "[0.25, 0.25]", "[0.5, 0.5]"),
        ({"branches": ["layers.0"]}, "branches", "['layers.0']", "['layers.0', 'layers.1']"),
    ],
)
@pytest.mark.parametrize("found", [True, False])
def test_the_state_of_a_run_with_other_arguments_is_refused_at_the_latest_when_branches_are_known(
    change, key, there, here, found
):
    _, other = attached(**change)
    model, handle = attached(found)
    message = (
        f"the state was saved with other {key} than this handle has: {there} in the state, {here} here. "
        "Attach with the arguments of the saved run"
    )
    if found or key in ("phases", "mode", "sampling"):
        assert refused(handle, other.state_dict()) == message
        return
    handle.load_state_dict(other.state_dict())
    with pytest.raises(rdp.StateError) as error:
        model(model.rows(2, 0))
    assert str(error.value) == message
    assert handle.branches == ()
    assert torch.equal(model(model.eval().rows(2, 0)), CASE.model()(model.rows(2, 0)))


def test_a_value_of_another_type_is_another_one_though_it_compares_equal():
    _, handle = attached()
    state = handle.state_dict() | {"mode": type("Text", (str,), {})("row")}
    assert "with other mode than" in refused(handle, state)


def test_what_is_no_state_at_all_is_refused():
    _, handle = attached()
    assert refused(handle, [1]) == "this is no state of a ResidualDropPath handle, but a list"
    assert refused(handle, {"mode": "row", "epoch": 3}) == (
        "this is no state of a ResidualDropPath handle: it lacks ['branches', 'forwards', 'phases', 'ranks', 'rates', "
        "'replayed', 'sampling', 'seed', 'step_count']"
    )


@pytest.mark.parametrize("length", [118, 119])
def test_a_long_value_is_cut_after_120_characters_in_a_message(length):
    value = "x" * length
    shown = repr(value) if length == 118 else repr(value)[:120] + "..."
    _, handle = attached()
    message = refused(handle, handle.state_dict() | {"seed": value})
    assert message == f"seed in the state is damaged: {shown}. Load another one"


def test_the_number_of_ranks_matters_where_each_has_rows_of_its_own():
    _, handle = attached()
    state = handle.state_dict()
    for damaged in ("one", None):
        message = f"ranks in the state is damaged or missing: {damaged!r}. Load another one"
        assert refused(handle, state | {"ranks": damaged}) == message
    assert refused(handle, state | {"ranks": 4}) == (
        "the state was saved by 4 ranks and is loaded by 1, whose rows would be masked otherwise. Resume with 4, or "
        "set state['ranks'] = 1 to accept other masks from here on"
    )
    _, handle = attached(mode="batch")
    handle.load_state_dict(handle.state_dict() | {"ranks": 4})  # all ranks have one mask


# -- where branches are known on one side only ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["DROP", "FREEZE"])
def test_a_state_that_comes_before_the_branches_is_kept_and_saved_again(phase):
    state = states()[phase]
    model, handle = attached(found=False, seed=0)
    handle.load_state_dict(state)
    assert handle.state_dict() == state
    twin, expected = attached()
    expected.load_state_dict(state)
    assert masks(model, handle, 4) == masks(twin, expected, 4)


def test_a_state_from_before_the_branches_were_found_fits_any():
    _, early = attached(found=False)
    model, handle = attached()
    early.advance()
    handle.load_state_dict(early.state_dict())
    assert (handle.step_count, handle.phase) == (1, Phase.FREEZE)
    assert handle.state_dict()["branches"] == ["layers.0", "layers.1"]
    masks(model, handle, 2)


def test_a_state_that_is_loaded_twice_counts_once():
    state = states()["DROP"]
    _, handle = attached()
    for _ in range(2):
        handle.load_state_dict(state)
    assert handle.state_dict() == state


def test_what_a_state_has_learnt_is_frozen_and_replayed_as_if_it_had_been_here():
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode="batch", decay="constant", seed=3)
    model, twin = case.model(), case.model()
    handle, other = (case.attach(m, example_inputs=m.rows(2, 0)) for m in (model, twin))
    frozen = set()
    for step in range(8):
        masks(model, handle, 2)
        other.load_state_dict(handle.state_dict())
        assert other.frozen == handle.frozen
        assert torch.equal(other.masks, handle.masks)
        frozen |= set(handle.frozen)
        handle.advance()
        other.advance()
        assert other.state_dict() == handle.state_dict()
        model.zero_grad()
        assert handle.step_count == step + 1
    assert frozen
