"""Which axis of a tensor holds the rows, and whether rows influence each other, seen on two rows and on one.

The axis that halves is the batch axis. It is not always the first: XLNet has it second, and MobileViT folds tokens
into it, so that one row of the batch is several entries. In which order these are, no shape tells, but numbers do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn

from rdp.branches import RowAxis
from rdp.discovery.chance import forced
from rdp.discovery.forwards import Inputs, observe, varied

Place = tuple[str, int]
"""A module and the number of one of its output tensors."""

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


@dataclass(frozen=True)
class Coupling:
    """What a forward of two rows and one of the first of them have shown.

    Attributes:
        coupled: The first module in whose output rows influence each other.
        not_finite: The first module whose output is not finite, so that nothing can be told of what follows.
    """

    coupled: str | None = None
    not_finite: str | None = None


Settled = tuple[dict[Place, RowAxis | None], Coupling]


def settle(
    model: nn.Module, pair: Inputs, single: Inputs, axes: Mapping[Place, RowAxis], sure: Collection[Place]
) -> Settled:
    """Look at the numbers: how are rows laid out, and do they influence each other?

    A model that draws random numbers in eval mode differs as much from itself: what is found is looked at again with
    all draws alike.

    Args:
        model: The model.
        pair: Inputs of two rows.
        single: Of these the first.
        axes: The axes of module outputs, in forward order.
        sure: Those in which rows are known to be independent.

    Returns:
        Of the outputs that were looked at the axes, with the layout; None if a row's entries are in no known order.
        And what couples the rows.
    """
    axes = {place: where for place, where in axes.items() if where.fold > 1 or place not in sure}
    if not axes:
        return {}, Coupling()
    settled, coupling = _settle(model, pair, single, axes)
    if coupling.coupled is not None or None in settled.values():
        with forced(high=False):
            settled, coupling = _settle(model, pair, single, axes)
    return settled, coupling


def _settle(
    model: nn.Module, pair: Inputs, single: Inputs, axes: Mapping[Place, RowAxis], vary: bool = True
) -> Settled:
    two, one = (observe(model, inputs, {module for module, _ in axes}) for inputs in (pair, single))
    settled: dict[Place, RowAxis | None] = {}
    unclear: dict[Place, RowAxis] = {}
    coupled, before = None, 0.0
    for (module, leaf), where in axes.items():
        if not one[module][leaf].is_meta and not one[module][leaf].isfinite().all():
            return settled, Coupling(coupled, not_finite=module)
        # Of a module that is called several times, on what is folded otherwise each time, this is one call.
        where = row_axis(two[module][leaf].shape, one[module][leaf].shape) or where
        layouts = layouts_of(where)
        errors = {layout: _row_error(two[module][leaf], one[module][leaf], layout) for layout in layouts}
        fitting = [layout for layout in layouts if errors[layout] <= _COUPLED]
        best = fitting[0] if fitting else min(layouts, key=lambda layout: errors[layout])
        settled[module, leaf] = best
        if len(fitting) > 1:
            unclear[module, leaf] = where
        if not fitting and before < _ROUNDING:  # there the error jumps, while rounding errors grow slowly
            if where.fold > 1:
                settled[module, leaf] = None
                continue
            coupled = module
        before = max(before, errors[best])
    if vary and unclear and (other := varied(pair, single)) is not None:
        # Inputs of zeros, say, have the same numbers in all entries. With other inputs a model may do anything.
        with suppress(Exception):
            settled |= _settle(model, *other, unclear, vary=False)[0]
    return settled, Coupling(coupled)


def layouts_of(where: RowAxis) -> list[RowAxis]:
    """Every order in which the entries of the rows may stand on an axis."""
    return [replace(where, outer=outer) for outer in range(1, where.fold + 1) if where.fold % outer == 0]


def row_of_two(pair: Tensor, where: RowAxis, row: int) -> Tensor:
    """The entries of one row in a tensor of two."""
    before, after = pair.shape[: where.axis], pair.shape[where.axis + 1 :]
    apart = pair.reshape(*before, where.outer, 2, where.fold // where.outer, *after)
    return apart.select(where.axis + 1, row).reshape(*before, where.fold, *after)


def _row_error(pair: Tensor, single: Tensor, where: RowAxis) -> float:
    """How much the first row differs beside a second one, relative to the largest number in it."""
    if pair.is_meta or not pair.is_floating_point() or pair.numel() != 2 * single.numel() or not single.numel():
        return 0.0
    error = (row_of_two(pair, where, 0).double() - single.double()).abs().max()
    return float(error / single.double().abs().max().clamp_min(1e-300))
