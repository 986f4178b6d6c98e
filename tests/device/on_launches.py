"""The budget: how many kernels a branch may launch more than in plain training. A change may not raise it."""

from __future__ import annotations

import pytest

from device.launches import WAYS, added

BUDGET = {
    #            rows          dense       batch, all kept  batch, all dropped
    "vit": ((6.5, 15.5), (4.5, 3.5), (0.25, -13.25), (-12.5, 0.25)),
    "resnet": ((4.5, 3.5), (4.5, 3.5), (0.25, -8.75), (-7.75, 0.25)),
    "convnext": ((7.25, 14.25), (4.5, 3.5), (0.25, -12.75), (-10.5, 0.25)),
    "swin": ((6.4, 18.1), (4.4, 3.4), (0.2, -15.8), (-14.1, 0.2)),
    "bert": ((6.5, 15.5), (4.5, 3.5), (0.25, -16.75), (-16.0, 0.25)),
    "gpt2": ((4.5, 3.5), (4.5, 3.5), (0.25, -18.75), (-17.75, 0.25)),
}
"""By model, for each of `WAYS`, in DROP and in FREEZE, forward and backward together.

- A fraction is what a forward launches once for all its branches: the copy of masks or of the order of rows.
- Rows: DROP gathers, fills, scatters, and the same backward. FREEZE gathers twice, and runs the branch's own kernels a
  second time for the dropped rows: it has twice the forward, and one backward.
- Dense, where nothing is on rows (BatchNorm; GPT-2, which computes differently for one row): `where` and its backward.
- Batch: what is dropped in DROP or kept in FREEZE has no backward, whose kernels are saved.
"""


@pytest.mark.parametrize("name", BUDGET)
def test_a_branch_launches_no_more_than_it_did(name: str) -> None:
    found = tuple(added(name, way) for way in WAYS)
    pairs = zip(sum(found, ()), sum(BUDGET[name], ()), strict=True)
    assert all(launches <= budget + 1e-6 for launches, budget in pairs), f"{found}, and the budget is {BUDGET[name]}"
