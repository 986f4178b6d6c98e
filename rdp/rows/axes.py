"""Which axis of a tensor holds the rows, and whether rows influence each other, seen on two rows and on one.

The axis that halves is the batch axis. It is not always the first: XLNet has it second, and MobileViT folds tokens
into it, so that one row of the batch is several consecutive entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rdp.branches import GatePoint, RowAxis
from rdp.discovery.forwards import Inputs, observe

_COUPLED, _ROUNDING = 1e-2, 1e-4
"""Relative errors: more than the first shows that rows influence each other; up to the second is rounding."""


def row_axis(pair: Sequence[int], single: Sequence[int]) -> RowAxis | None:
    """The axis along which the shapes of a tensor of two rows and of one row differ; None if that is unclear."""
    if len(pair) != len(single):
        return None
    differing = [i for i, (two, one) in enumerate(zip(pair, single, strict=True)) if two != one]
    if len(differing) != 1 or pair[differing[0]] != 2 * single[differing[0]]:
        return None
    return RowAxis(differing[0], single[differing[0]])


def first_coupled(model: nn.Module, pair: Inputs, single: Inputs, gates: Sequence[GatePoint]) -> str | None:
    """The first module in whose output rows influence each other.

    There the error jumps; rounding errors grow slowly.
    """
    gates = [gate for gate in gates if gate.rows is not None]
    if not gates:
        return None
    two, one = (observe(model, inputs, {gate.module for gate in gates}) for inputs in (pair, single))
    before = 0.0
    for gate in gates:
        assert gate.rows is not None
        error = _row_error(two[gate.module][gate.leaf], one[gate.module][gate.leaf], gate.rows)
        if error > _COUPLED and before < _ROUNDING:
            return gate.module
        before = max(before, error)
    return None


def _row_error(pair: Tensor, single: Tensor, where: RowAxis) -> float:
    """How much the first row differs beside a second one, relative to the largest number in it."""
    if pair.is_meta or not pair.is_floating_point() or not single.numel():
        return 0.0
    first = pair.narrow(where.axis, 0, where.fold).double()
    error = (first - single.double()).abs().max()
    return float(error / single.double().abs().max().clamp_min(1e-300))
