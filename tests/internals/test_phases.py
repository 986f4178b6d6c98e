"""Which phase a step has and which DROP it belongs to, against counting from the first step on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rdp
from rdp import Phase
from rdp.phases import Schedule

PHASES = st.lists(st.sampled_from(Phase), min_size=1, max_size=6)


def freezes_first(phases: list[Phase]) -> bool:
    """Is there a FREEZE before any DROP?"""
    drops = itertools.accumulate(phase is Phase.DROP for phase in phases)
    return any(phase is Phase.FREEZE and not seen for phase, seen in zip(phases, drops, strict=True))


@given(PHASES.filter(lambda phases: not freezes_first(phases)), st.integers(0, 60))
def test_phases_repeat_and_a_cycle_begins_with_each_drop(phases, step):
    schedule = Schedule(iter(phases))
    history = list(itertools.islice(itertools.cycle(phases), step + 1))
    assert schedule.phases == tuple(phases)
    assert schedule.at(step) == (history[step], max(history.count(Phase.DROP) - 1, 0))


@given(PHASES)
def test_a_freeze_before_any_drop_is_refused_and_nothing_else(phases):
    if not freezes_first(phases):
        assert Schedule(phases).phases == tuple(phases)
        return
    with pytest.raises(rdp.ArgumentError) as refused:
        Schedule(phases)
    assert str(refused.value) == (
        f"phases {[phase.name for phase in phases]} has FREEZE before any DROP; FREEZE replays the masks of the latest "
        "DROP, so put a DROP first"
    )


@pytest.mark.parametrize("phases", [Phase.DROP, "DROP", b"DROP", 3, None])
def test_what_is_no_sequence_is_refused(phases):
    with pytest.raises(rdp.ArgumentError) as refused:
        Schedule(phases)
    expected = f"phases must be a sequence of rdp.Phase, such as (rdp.Phase.DROP,); got {phases!r}"
    assert str(refused.value) == expected


def test_an_empty_sequence_and_foreign_members_are_refused():
    with pytest.raises(rdp.ArgumentError) as refused:
        Schedule([])
    assert str(refused.value) == "phases is empty; the paper's sequence is (rdp.Phase.DROP, rdp.Phase.FREEZE)"
    with pytest.raises(rdp.ArgumentError) as refused:
        Schedule([Phase.DROP, "frozen"])
    expected = "phases must hold rdp.Phase members or their names, 'drop', 'freeze', 'plain'; got 'frozen'"
    assert str(refused.value) == expected
