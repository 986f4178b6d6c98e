"""Where a branch ends: the modules whose outputs must be masked so that the branch operand of a sum is masked.

Usually one module returned exactly the tensor that is added. Where functions follow it (a layer scale, a permute, a
concatenation), the search walks back through those that commute with a row mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rdp.discovery import ops
from rdp.discovery.graph import Graph
from rdp.discovery.records import Call
from rdp.discovery.residuals import Residual


@dataclass(frozen=True)
class Seam:
    """A module call whose output is masked."""

    call: Call
    value: int
    """The masked value, one of `call.outputs`."""
    zero_only: bool = False
    """A function between here and the sum keeps zeros but does not commute with rescaling (relu, gelu)."""
    of_block: bool = False
    """The call is the whole block: undropped rows take its output, dropped ones its input."""


def find_seams(graph: Graph, residual: Residual) -> list[Seam]:
    """The seams that together mask the branch of `residual`; empty where there is none."""
    path = graph.between(residual.fork, residual.branch)
    seams = _seams(graph, residual.branch, residual, path)
    if not seams or parameters_after(graph, residual, residual.branch, seams):
        return block_seam(graph, residual) or seams
    return seams


def parameters_after(graph: Graph, residual: Residual, value: int, seams: list[Seam]) -> set[str]:
    """Parameters applied between the seams and `value`: FREEZE could not keep undropped rows from training them."""
    before = set().union(*(graph.between(residual.fork, seam.value) for seam in seams))
    after = graph.between(residual.fork, value) - before
    if value == residual.branch:
        after = after | {residual.entry} | graph.between(residual.entry, residual.sum)
    return graph.parameters(after) & graph.trainable


def _seams(graph: Graph, value: int, residual: Residual, path: set[int]) -> list[Seam]:
    trace = graph.trace
    node = graph.values[value]

    def called_once(call: Call) -> bool:
        return call.returns_tensor and trace.count[call.name] == 1

    # The last and outermost module that returned this very tensor, which is the last to have returned; a module
    # called once is the better seam.
    calls = [c for c in node.returned_by if c.end <= residual.sum and c.begin > residual.fork]
    best = max(reversed(calls), key=lambda c: (c.returns_tensor, trace.count[c.name] == 1, c.end), default=None)
    if best is not None and called_once(best):
        return [Seam(best, value)]
    earlier = _earlier_seams(graph, value, residual, path)
    if best is None:
        return earlier
    if (
        earlier
        and all(called_once(seam.call) for seam in earlier)
        and not parameters_after(graph, residual, value, earlier)
    ):
        return earlier
    return [Seam(best, value)]


def _earlier_seams(graph: Graph, value: int, residual: Residual, path: set[int]) -> list[Seam]:
    """Seams of the values that `value` was made from, if masking those masks `value`."""
    node = graph.values[value]
    sources = [i for i in dict.fromkeys(node.inputs) if i in path]
    whole = len(sources) == len(set(node.inputs))
    zero_only = node.op in ops.KEEPS_ZERO
    if node.op in ops.ADD | ops.SUBTRACT:
        needed = sources if whole and len(node.inputs) > 1 else []
    elif node.op in ops.GATHER:
        needed = sources if whole else []
    elif node.op in ops.SCALE:
        # Two data-dependent factors: both are masked, or gradients would pass FREEZE through the other one.
        needed, zero_only = sources, len(sources) > 1
        if zero_only and node.op in ops.DIVIDE:
            return []  # by zero
        if zero_only and any(graph.values[i].shape[:1] != node.shape[:1] for i in sources):
            return []  # a factor made of all rows would be another where some are masked
    elif node.op in ops.COMMUTES or node.op in ops.KEEPS_ZERO:
        needed = sources[:1]
    else:
        needed = []
    parts = [_seams(graph, i, residual, path) for i in needed]
    if node.op in ops.SCALE and any(parts):
        stops = [_stops(graph, i, residual, path) for i, part in zip(needed, parts, strict=True) if not part]
        parts = [*stops, *filter(None, parts)]  # what is zero comes last, and gives the branch its name
    if not parts or not all(parts):
        return []
    seams = {seam.value: seam for part in parts for seam in part}
    return [replace(seam, zero_only=seam.zero_only or zero_only) for seam in seams.values()]


def _stops(graph: Graph, value: int, residual: Residual, path: set[int]) -> list[Seam]:
    """Seams that all of a factor's gradient passes. What they do to its numbers is no matter, since another is zero.

    So in squeeze-excite, `f(x) * sigmoid(fc(f(x).mean()))`, the seams are f and fc.
    """
    node = graph.values[value]
    calls = [c for c in node.returned_by if residual.fork < c.begin and graph.trace.count[c.name] == 1]
    if calls:
        return [Seam(calls[-1], value, zero_only=True)]
    parts = [_stops(graph, i, residual, path) for i in dict.fromkeys(node.inputs) if i in path]
    return [seam for part in parts for seam in part] if parts and all(parts) else []


def block_seam(graph: Graph, residual: Residual) -> list[Seam]:
    """A block that takes x and returns x + f(x) can be masked as a whole: where(mask, output, input)."""
    owner = graph.values[residual.sum].owner
    if (
        residual.kind == "identity"
        and not residual.scaled
        and owner is not None
        and owner is not graph.trace.root
        and owner.returns_tensor
        and owner.outputs == (residual.sum,)
        and owner.inputs[:1] == (residual.shortcut,)
    ):
        return [Seam(owner, residual.sum, zero_only=True, of_block=True)]
    return []
