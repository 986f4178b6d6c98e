"""What the plan says of each branch."""

from __future__ import annotations

import pytest

from internals.rows.hand_made import program
from rdp.branches import Branch
from rdp.rows.plan import Plan

PLAN = Plan({"some": program()}, {"all": "why"}, wrong=False)


@pytest.mark.parametrize(
    ("name", "before", "compute", "note"),
    [
        ("some", "", "rows", ""),
        ("some", "ambiguous", "rows", "ambiguous"),
        ("all", "", "dense", "dense: why"),
        ("all", "ambiguous", "dense", "ambiguous, dense: why"),
        ("another", "", "dense", ""),
        ("another", "ambiguous", "dense", "ambiguous"),
    ],
)
def test_a_branch_is_noted_to_run_on_rows_or_why_not(name, before, compute, note):
    noted = PLAN.noted(Branch(name, "", "identity", (), note=before))
    assert (noted.name, noted.compute, noted.note) == (name, compute, note)
