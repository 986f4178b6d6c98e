"""What a handle saves: where training stands, as plain numbers. What is loaded is checked whole before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rdp.branches import Branch
from rdp.errors import StateError, shortened
from rdp.rates import rates_of
from rdp.training.step import Draw

if TYPE_CHECKING:
    from rdp.training.run import Run

_VERSION = 4
_LAST_STEP = 2**62  # masks are drawn by 64-bit integers
_MOST_ROWS = 2**24


def save(run: Run) -> dict[str, Any]:
    """Counters, seed, rates, and the rows of the forwards that are replayed or have learnt; masks follow from them."""
    branches, rates = run.expected or _named(run, run.branches)
    return {
        "version": _VERSION,
        "branches": list(branches),
        "rates": list(rates),
        "phases": [phase.value for phase in run.schedule.phases],
        "mode": run.options.mode,
        "sampling": run.options.sampling,
        "seed": run.seed,
        "rate": run.cycles.rate,
        "cycle_rate": run.step.rate,
        "factor": run.cycles.factor(run.schedule.drop_of(run.step.number)),
        "step_count": run.step.number,
        "forwards": [list(pair) for pair in run.step.learnt()],
        "replayed": [[draw.number, draw.rows] for draw in run.step.replay.values()],
        "ranks": run.agreement.ranks.size,
    }


def load(run: Run, state: dict[str, Any]) -> None:
    """Continue where `state` was saved, on this or another rank.

    Raises:
        StateError: If it does not fit, or is damaged; nothing has changed then.
    """
    state = _check(run, state)
    number = state["step_count"]
    forwards = [(position, rows) for position, rows in state["forwards"]]
    replay = {row[0]: Draw(*row) for row in state["replayed"]}
    run.seed = state["seed"]
    run.expected = None if run.branches else (state["branches"], state["rates"])
    run.set_rate(float(state["rate"]))
    run.go_to(number, replay, forwards, float(state["cycle_rate"]))


def check_branches(run: Run, branches: Sequence[Branch]) -> None:
    """Compare branches that were found with those of a state that was loaded before.

    Raises:
        StateError: If they are others.
    """
    if run.expected is not None and run.expected[0]:
        for key, mine, saved in zip(("branches", "rates"), _named(run, branches), run.expected, strict=True):
            _compare(key, mine, saved)


def _named(run: Run, branches: Sequence[Branch]) -> tuple[list[str], list[float]]:
    """Names and rates, those that `attach` was asked for."""
    return [branch.name for branch in branches], [*rates_of(branches, run.options.rate, run.options.decay)]


def _check(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise StateError(f"this is no state of a ResidualDropPath handle, but a {type(state).__name__}")
    mine = save(run)
    version = state.get("version", 1)
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise StateError(f"the state has version {shortened(version)}, this library reads up to {_VERSION}; update it")
    # Before version 4 rates did not change over training.
    constant: dict[str, Any] = {"rate": run.options.rate, "cycle_rate": run.options.rate, "factor": None}
    state = state if version == _VERSION else constant | state
    missing = mine.keys() - state.keys() - {"version"}
    if missing:
        raise StateError(f"this is no state of a ResidualDropPath handle: it lacks {sorted(missing)}")
    if version < 3:
        raise StateError(
            f"the state has version {version}, whose masks are of a random stream that is not drawn any more. Resume "
            "with the release of rdp that saved it; or load model and optimizer without it, to go on with other masks"
        )
    names, rates = state["branches"], state["rates"]
    sound = {
        "branches": _is_list_of(names, str),
        "rates": _is_list_of(rates, float, int) and isinstance(names, list) and len(rates) == len(names),
        "seed": _is_count(state["seed"], 2**64),
        **{key: _is_number(state[key]) and 0 <= state[key] < 1 for key in ("rate", "cycle_rate")},
        "factor": state["factor"] is None or (_is_number(state["factor"]) and 0 <= state["factor"] <= 1),
        "step_count": _is_count(state["step_count"], _LAST_STEP),
        "forwards": _is_table(state["forwards"]),
        "replayed": _is_table(state["replayed"]),
    }
    for key in (key for key, is_sound in sound.items() if not is_sound):
        raise StateError(f"{key} in the state is damaged: {shortened(state[key])}. Load another one")
    for key in ["phases", "mode", "sampling"] + (["branches", "rates"] if run.branches and names else []):
        _compare(key, mine[key], state[key])
    saved, here = state["ranks"], run.agreement.ranks.size
    if not _is_count(saved, 2**31):
        raise StateError(f"ranks in the state is damaged or missing: {shortened(saved)}. Load another one")
    if saved != here and run.options.mode == "row":
        raise StateError(
            f"the state was saved by {saved} ranks and is loaded by {here}, whose rows would be masked otherwise. "
            f"Resume with {saved}, or set state['ranks'] = {here} to accept other masks from here on"
        )
    drop = run.schedule.drop_of(state["step_count"])
    if state["factor"] not in (None, factor := run.cycles.factor(drop)):
        raise StateError(
            f"the state was saved with another rate_schedule: it gave {state['factor']:g} at step {drop}, that of "
            f"this handle gives {factor:g}. Attach with the rate_schedule of the saved run, or set state['factor'] = "
            "None to go on with this one from the next DROP on"
        )
    return state


def _compare(key: str, mine: object, saved: object) -> None:
    if type(mine) is not type(saved) or mine != saved:
        raise StateError(
            f"the state was saved with other {key} than this handle has: {shortened(saved)} in the state, "
            f"{shortened(mine)} here. Attach with the arguments of the saved run"
        )


def _is_count(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_list_of(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_table(value: object) -> bool:
    """Is this a list of lists of two numbers, a position and how many rows?"""
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(r, list) and len(r) == 2 and all(map(_is_count, r, (2**32, _MOST_ROWS))) for r in rows)
