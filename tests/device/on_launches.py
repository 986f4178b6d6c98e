"""The budget: how many kernels a branch may launch more than in plain training. A change may not raise it."""

from __future__ import annotations

import pytest

from device.launches import WAYS, added

BUDGET = {
    #            rows         dense      batch, all kept  batch, all dropped
    "vit": ((6.25, 15.25), (4.25, 3.25), (0.0, -13.5), (-12.75, 0.0)),
    "resnet": ((4.25, 3.25), (4.25, 3.25), (0.0, -9.0), (-8.0, 0.0)),
    "convnext": ((7.0, 14.0), (4.25, 3.25), (0.0, -13.0), (-10.75, 0.0)),
    "swin": ((6.17, 17.84), (4.17, 3.17), (0.0, -16.0), (-14.33, 0.0)),
    "bert": ((6.25, 15.25), (4.25, 3.25), (0.0, -17.0), (-16.25, 0.0)),
    "gpt2": ((6.25, 21.75), (4.25, 3.25), (0.0, -19.0), (-18.25, 0.0)),
    "conditioned": ((6.25, 13.5), (4.25, 8.25), (0.0, -2.0), (-3.75, 0.0)),
}
"""By model, for each of `WAYS`, in DROP and in FREEZE, forward and backward together.

- A fraction is what a forward launches once for all its branches: the copy of masks or of the order of rows.
- Rows: DROP gathers, fills and scatters, and so backwards. FREEZE gathers twice, and runs the branch's own kernels a
  second time for the undropped rows: it has two forwards, and one backward.
- Dense, which ResNet is anyway for its BatchNorm: `where` and its backward. The conditioned model also cuts in FREEZE.
- Batch: what is dropped in DROP or kept in FREEZE has no backward, whose kernels are saved.
"""


@pytest.mark.parametrize("name", BUDGET)
def test_a_branch_launches_no_more_than_it_did(name: str) -> None:
    found = tuple(added(name, way) for way in WAYS)
    pairs = zip(sum(found, ()), sum(BUDGET[name], ()), strict=True)
    assert all(launches <= budget + 1e-6 for launches, budget in pairs), f"{found}, and the budget is {BUDGET[name]}"
