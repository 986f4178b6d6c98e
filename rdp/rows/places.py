"""Where each branch has its rows, in what is masked and in what is cut; or why it cannot be masked by row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rdp.branches import CutPoint, RowAxis
from rdp.discovery.candidates import Candidate
from rdp.discovery.find import Discovery
from rdp.discovery.forwards import Inputs
from rdp.discovery.graph import Graph
from rdp.discovery.records import Call
from rdp.rows.axes import Coupling, Place, row_axis, settle

Twins = Mapping[tuple[str, int], Call]
"""The calls of the forward of one row, by module and number."""


@dataclass
class Places:
    """Of one branch.

    Attributes:
        gates: The outputs that end it, each with the axis of its rows.
        cuts: What FREEZE cuts besides.
    """

    gates: dict[Place, RowAxis | None]
    cuts: tuple[CutPoint, ...]

    def settle(self, settled: dict[Place, RowAxis | None]) -> str | None:
        """Take over what numbers have told; returns why the branch cannot be masked by row."""
        if None in self.gates.values():
            return "its output has no axis that follows the batch; mode='batch' needs none"
        self.gates = {place: settled.get(place, where) for place, where in self.gates.items()}
        if None in self.gates.values():
            return (
                "its output has several entries for each row, in an order that is not known, or rows influence each "
                "other; mode='batch' needs no rows"
            )
        self.cuts = tuple(
            cut if cut.of_input else replace(cut, rows=settled.get((cut.module, cut.leaf), cut.rows))
            for cut in self.cuts
        )
        if any(cut.rows is None for cut in self.cuts):
            return (
                "it is multiplied by something from outside that does not follow the batch row by row, so what that is "
                "made of would learn from frozen rows; mode='batch' needs no rows"
            )
        return None


def locate(candidates: Collection[Candidate], pair: Graph, single: Graph) -> dict[int, Places]:
    """The places of these branches by `id`, from forwards of two rows and of one."""
    twins = {(call.name, call.ordinal): call for call in single.trace.calls}
    return {id(c): Places(_gates(c, pair, single, twins), _cuts(c, pair, single, twins)) for c in candidates}


def settle_by_row(
    found: Discovery, places: dict[int, Places], model: nn.Module, pair: Inputs, single: Inputs, sure: Collection[str]
) -> Coupling:
    """Look at the numbers, and refuse what cannot be masked by row.

    Args:
        found: Its candidates are refused.
        places: Theirs.
        model: The model.
        pair: Inputs of two rows.
        single: Of these the first.
        sure: Names of branches in which rows are known to be independent.

    Returns:
        Where rows influence each other, or are no numbers.
    """
    axes: dict[Place, RowAxis] = {}
    for candidate in found.accepted:
        own = places[id(candidate)]
        axes |= {place: where for place, where in own.gates.items() if where is not None}
        folded = [cut for cut in own.cuts if not cut.of_input and cut.rows is not None and cut.rows.fold > 1]
        axes |= {(cut.module, cut.leaf): cut.rows for cut in folded if cut.rows is not None}
    certain = {place for c in found.accepted if c.name in sure for place in places[id(c)].gates}
    settled, coupling = settle(model, pair, single, axes, certain)
    for candidate in found.accepted:
        candidate.reason = places[id(candidate)].settle(settled)
    return coupling


def _gates(candidate: Candidate, pair: Graph, single: Graph, twins: Twins) -> dict[tuple[str, int], RowAxis | None]:
    """Where the outputs that end a branch have rows, by module and number, from forwards of two rows and of one."""
    axes: dict[tuple[str, int], RowAxis | None] = {}
    for seam in candidate.seams:
        name, leaf = seam.call.name, seam.call.outputs.index(seam.value)
        twin = twins.get((name, seam.call.ordinal))
        axes[name, leaf] = None
        if twin is not None and leaf < len(twin.outputs):
            axes[name, leaf] = row_axis(pair.values[seam.value].shape, single.values[twin.outputs[leaf]].shape)
    return axes


def _cuts(candidate: Candidate, pair: Graph, single: Graph, twins: Twins) -> tuple[CutPoint, ...]:
    """What FREEZE cuts besides the outputs that end a branch, each with its rows; a call stands for all of a module."""
    points: dict[tuple[str, bool, int], CutPoint] = {}
    for cut in candidate.cuts:
        twin = twins.get((cut.call.name, cut.call.ordinal))
        alone = () if twin is None else twin.inputs if cut.of_input else twin.outputs
        rows, elements = None, cut.elements
        if cut.leaf < len(alone):
            rows = row_axis(pair.values[cut.value].shape, single.values[alone[cut.leaf]].shape)
        for axis in range(elements.dim()):
            first = elements.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(elements), elements):
                elements = first  # and fits other lengths
        if rows is not None and (elements.shape[rows.axis] != 1 or (cut.of_input and rows.fold > 1)):
            rows = None  # numbers are looked at in outputs only, see `axes.settle`
        point = CutPoint(cut.call.name, cut.leaf, rows, cut.of_input, None if elements.all() else elements.clone())
        points[cut.call.name, cut.of_input, cut.leaf] = point
    return tuple(points.values())
