"""Which additions of a traced forward are residual: `y = S(x) + F(x)` with a shortcut S and a branch F.

Three shapes are recognised, in this order:

1. *identity*: one operand was made from the other, `x + f(x)`;
2. *parallel*: one operand was made from a term of the other, `(x + f(x)) + g(x)`;
3. *projection*: both were made from one value inside the adding module, and one way there is plainer than the other,
   `downsample(x) + f(x)`.

Everything else that adds (biases, position embeddings, feature pyramids, U-Net skips, re-parameterised sums) is
rejected, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rdp.branches import Kind
from rdp.discovery import ops
from rdp.discovery.graph import AFFINE_MAP, NONLINEAR, Graph
from rdp.discovery.trace import Value


@dataclass(frozen=True)
class Residual:
    """A residual addition; values are indices into the trace."""

    sum: int
    kind: Kind
    fork: int
    """x: where shortcut and branch part."""
    shortcut: int
    branch: int
    ambiguous: bool = False
    """Both ways are nonlinear, and only their number of layers told which is the shortcut."""


@dataclass(frozen=True)
class Rejection:
    """An addition that is not residual, or cannot be gated."""

    sum: int
    block: str
    reason: str


def find_residuals(graph: Graph) -> tuple[list[Residual], list[Rejection]]:
    """Sort the additions of a forward into residual ones and others, in forward order."""
    found: list[Residual] = []
    rejected: list[Rejection] = []
    for node in graph.values:
        if node.op not in ops.ADD:
            continue
        verdict = _classify(graph, node)
        if isinstance(verdict, Residual):
            reason = _disqualify(graph, verdict, sums={r.sum for r in found})
            if reason is None:
                found.append(verdict)
                continue
            verdict = reason
        rejected.append(Rejection(node.index, node.owner.name if node.owner else "", verdict))
    return found, rejected


def _classify(graph: Graph, node: Value) -> Residual | str:
    """The residual that `node` is, or why it is none."""
    values = graph.values
    operands = [i for i in node.inputs if values[i].is_data]
    if len(set(operands)) < 2:
        return "adds a constant"  # bias, position embedding, buffer, x + x
    left, right = operands[0], max(operands[1:])
    if not node.is_float or values[left].shape != node.shape or values[right].shape != node.shape:
        return "broadcasts or is no real floating point"
    for shortcut, branch in ((left, right), (right, left)):
        for fork in (shortcut, graph.strip(shortcut)):
            if values[fork].is_float and fork in graph.ancestors(branch, fork):
                return Residual(node.index, "identity", fork, shortcut, branch)
    begin = node.owner.begin if node.owner else 0
    for shortcut, branch in ((left, right), (right, left)):
        fork_or_none = _common_term(graph, shortcut, branch)
        if fork_or_none is not None and all(i >= begin for i in graph.between(fork_or_none, branch)):
            return Residual(node.index, "parallel", fork_or_none, shortcut, branch)
    return _classify_projection(graph, node, left, right, begin)


def _common_term(graph: Graph, shortcut: int, branch: int) -> int | None:
    for term in map(graph.strip, graph.terms(shortcut)):
        if graph.values[term].is_float and term != branch and term in graph.ancestors(branch, term):
            return term
    return None


def _classify_projection(graph: Graph, node: Value, left: int, right: int, begin: int) -> Residual | str:
    values = graph.values
    common = [i for i in graph.ancestors(left, 0) & graph.ancestors(right, 0) if values[i].is_float]
    if not common:
        return "operands have no common source"
    fork = max(common)
    paths = {left: graph.between(fork, left), right: graph.between(fork, right)}
    # (rank, number of weighted layers): the smaller one is the shortcut
    weight = {i: (graph.rank(p), sum(values[v].op in ops.WEIGHTED for v in p)) for i, p in paths.items()}
    shortcut, branch = (left, right) if weight[left] < weight[right] else (right, left)
    tie = weight[left][0] == weight[right][0]
    if tie:
        told_apart = weight[shortcut][1] == 1 < weight[branch][1]
        mixes = any(values[i].op in ops.MIXING for i in paths[shortcut])
        if weight[left][0] < NONLINEAR or not told_apart or mixes:
            return "both operands are linear" if weight[left][0] < NONLINEAR else "both operands are nonlinear"
    if any(i < begin for i in paths[branch]):
        return "branch does not run inside the adding module"  # FPN, HRNet fusion
    if all(any(values[i].op in ops.SLICE and fork in values[i].inputs for i in p) for p in paths.values()):
        return "operands are parts of one split tensor"  # Res2Net
    if any(values[u].op in ops.CONCATENATE for u in node.users) and any(
        values[i].op not in ops.VIEW | ops.SLICE for i in paths[shortcut]
    ):
        return "cell that feeds a concatenation"  # NASNet
    return Residual(node.index, "projection", fork, shortcut, branch, ambiguous=tie)


def _disqualify(graph: Graph, residual: Residual, sums: set[int]) -> str | None:
    """Why an addition of residual shape is none after all."""
    values = graph.values
    path = graph.between(residual.fork, residual.branch)
    encloses = bool(sums & path)
    if (
        (encloses or residual.kind == "projection")
        and values[residual.branch].is_data
        and any(values[i].op in ops.UPSAMPLE for i in path)
        and residual.fork not in graph.ancestors(residual.branch, residual.fork, without=ops.UPSAMPLE)
    ):
        return "long skip over a resampled path"  # U-Net, FPN
    if (
        graph.rank(path) <= AFFINE_MAP
        and values[graph.strip(residual.branch)].op in ops.ADD
        and sum(i in path for i in graph.terms(residual.branch)) > 1
    ):
        return "sum of linear branches"  # re-parameterised RepVGG, MobileOne
    if not graph.parameters(path):
        return "branch has no parameters"
    if _adds_back(graph, residual):
        return "statistics of the input are added back"  # de-normalisation of time series
    return None


def _adds_back(graph: Graph, residual: Residual) -> bool:
    """Is the shortcut a number for many, a mean say, that was subtracted at the beginning of the branch?"""
    values = graph.values
    size = math.prod(values[residual.sum].shape)
    fewer = {i for i in graph.sources(residual.shortcut) if math.prod(values[i].shape) < size}
    if not fewer:
        return False
    subtractions = (values[i] for i in graph.ancestors(residual.branch, min(fewer)) if values[i].op in ops.SUBTRACT)
    return any(fewer.intersection(graph.sources(node.inputs[1])) for node in subtractions if len(node.inputs) == 2)


def without_side_inputs(graph: Graph, residuals: list[Residual]) -> tuple[list[Residual], list[Rejection]]:
    """Reject sums whose "branch" is the shortcut of another sum: a side input such as DETR's `hidden + query_pos`."""
    streams = {graph.strip(r.shortcut) for r in residuals}
    kept, rejected = [], []
    for residual in residuals:
        if graph.strip(residual.branch) in streams:
            owner = graph.values[residual.sum].owner
            rejected.append(Rejection(residual.sum, owner.name if owner else "", "side input to a residual stream"))
        else:
            kept.append(residual)
    return kept, rejected
