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
from dataclasses import dataclass, replace

from rdp.branches import Kind
from rdp.discovery import ops
from rdp.discovery.graph import AFFINE_MAP, LINEAR_FORM, NONLINEAR, Graph
from rdp.discovery.records import Value
from rdp.discovery.sums import Sum, sum_of


@dataclass(frozen=True)
class Residual:
    """A residual addition; values are indices into the trace."""

    sum: int
    kind: Kind
    fork: int
    """x: where shortcut and branch part."""
    shortcut: int
    branch: int
    entry: int
    """The value that takes in shortcut and branch: the sum, or the list that is summed."""
    scaled: bool = False
    """Is a multiple of the shortcut added?"""
    factors: tuple[int, ...] = ()
    """What the sum multiplies the branch by, as `addcmul` does."""
    weights: tuple[int, ...] = ()
    """What the sum multiplies the shortcut by, as `lerp` does."""
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
        total = sum_of(graph, node)
        if total is None and node.op not in ops.ADD:
            continue
        reasons = []
        try:
            for residual in _classify(graph, node, total):
                reason = _disqualify(graph, residual, sums={r.sum for r in found})
                if reason is None:
                    found.append(_begun_late(graph, residual, found))
                else:
                    reasons.append(reason)
        except _NotResidual as why:
            reasons.append(str(why))
        if node.op in ops.ADD:  # others are not thought of as additions where they are none
            rejected += [Rejection(node.index, node.owner.name if node.owner else "", reason) for reason in reasons]
    return found, rejected


_NONLINEAR, _ELSEWHERE, _MANY, _BROADCASTS = _NOT_TOLD_APART = (
    "both operands are nonlinear",
    "branch does not run inside the adding module",
    "no term is the shortcut of all others",
    "what is added broadcasts",
)
"""Why a sum that looks like a residual one may not be taken for one."""


class _NotResidual(Exception):
    """Why an addition is none."""


def _classify(graph: Graph, node: Value, total: Sum | None) -> list[Residual]:
    """The residual sums that `node` is, one for each branch."""
    values = graph.values
    if total is None:
        constant = sum(values[i].is_data for i in set(node.inputs)) < 2  # bias, position embedding, buffer, x + x
        raise _NotResidual("adds a constant" if constant else "is no floating point")

    def residual(kind: Kind, fork: int, shortcut: int, branch: int) -> Residual:
        factors, weights = (total.factors.get(term, ()) for term in (branch, shortcut))
        scaled = shortcut in total.scaled
        return Residual(node.index, kind, fork, shortcut, branch, total.entry, scaled, factors, weights)

    whole = [term for term in total.terms if term not in total.partial]
    if not whole or (node.op in ops.ADD | ops.SUBTRACT and len(whole) < len(total.terms)):
        raise _NotResidual(_BROADCASTS)
    for shortcut in whole:
        others = [term for term in total.terms if term != shortcut]
        forks = [_made_from(graph, shortcut, branch) for branch in others]
        if all(fork is not None for fork in forks):
            if node.op in ops.SUBTRACT and (shortcut in total.scaled or _is_distance(graph, node)):
                raise _NotResidual("the increment of a value, or an error")
            pairs = zip(forks, others, strict=True)
            return [residual("identity", fork, shortcut, branch) for fork, branch in pairs if fork is not None]
    if len(whole) != 2:
        raise _NotResidual(_MANY)
    begin = _begin(graph, node, whole)
    for shortcut, branch in (whole, whole[::-1]):
        if node.op in ops.SUBTRACT and (shortcut in total.scaled or _is_distance(graph, node)):
            continue
        term = _common_term(graph, shortcut, branch)
        if term is not None and all(i >= begin for i in graph.between(term, branch)):
            return [residual("parallel", term, shortcut, branch)]
    if node.op in ops.SUBTRACT:
        raise _NotResidual("a difference of two")
    fork, shortcut, branch, ambiguous = _projected(graph, node, whole[0], whole[1], begin)
    return [replace(residual("projection", fork, shortcut, branch), ambiguous=ambiguous)]


def _begin(graph: Graph, node: Value, terms: list[int]) -> int:
    """Where the module that adds begins; of a module that is given the terms and only adds, where its caller does."""
    values, owner = graph.values, node.owner

    def given(index: int, begin: int) -> bool:
        sources = [i for i in set(values[index].inputs) if values[i].is_data]
        scaled = len(sources) == 1 and values[index].op in ops.VIEW | ops.SCALE
        return index < begin or (scaled and given(sources[0], begin))

    while owner is not None and owner.parent is not None and all(given(term, owner.begin) for term in terms):
        owner = owner.parent
    return owner.begin if owner is not None else 0


def _made_from(graph: Graph, shortcut: int, branch: int) -> int | None:
    """The shortcut, or what it is a view of, if the branch is made from that."""
    for fork in (shortcut, graph.strip(shortcut)):
        if graph.values[fork].is_float and fork in graph.ancestors(branch, fork) - {branch}:
            return fork
    return None


def _common_term(graph: Graph, shortcut: int, branch: int) -> int | None:
    terms = (fork for term in graph.terms(shortcut) for fork in (term, graph.strip(term)))
    return next((term for term in terms if _made_from(graph, term, branch) == term), None)


def _is_distance(graph: Graph, node: Value) -> bool:
    """Is a difference only used as an error, squared say?"""
    todo, measured = [node.index], False
    while todo:
        index = todo.pop()
        for user in map(graph.values.__getitem__, graph.values[index].users):
            if user.op in ops.DISTANCE or (user.op in ops.SCALE and user.inputs == (index, index)):
                measured = True
            elif user.op in ops.VIEW | ops.SLICE | ops.SCALE:
                todo.append(user.index)
            else:
                return False
        if index in graph.trace.root.outputs:
            return False
    return measured


def _projected(graph: Graph, node: Value, left: int, right: int, begin: int) -> tuple[int, int, int, bool]:
    """Fork, shortcut and branch where both operands were made from one value, and whether that is ambiguous."""
    values = graph.values
    common = [i for i in graph.ancestors(left, 0) & graph.ancestors(right, 0) if values[i].is_float]
    if not common:
        raise _NotResidual("operands have no common source")
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
            raise _NotResidual(_NONLINEAR if weight[left][0] == NONLINEAR else "both operands are linear")
    only_scaled = all(values[i].op in ops.VIEW | ops.SCALE for i in paths[shortcut])
    if not (only_scaled and weight[shortcut][0] == LINEAR_FORM) and any(i < begin for i in paths[branch]):
        raise _NotResidual(_ELSEWHERE)  # FPN, HRNet fusion
    parts = all(any(values[i].op in ops.SLICE and fork in values[i].inputs for i in path) for path in paths.values())
    if parts and (weight[shortcut][0] > LINEAR_FORM or graph.reaches_output([branch], around={node.index})):
        raise _NotResidual("operands are parts of one split tensor")  # Res2Net, but not RevNet
    joined = [values[user].op in ops.CONCATENATE for user in node.users]
    if any(joined) and (all(joined) or tie) and any(values[i].op not in ops.VIEW | ops.SLICE for i in paths[shortcut]):
        raise _NotResidual("cell that feeds a concatenation")  # NASNet
    return fork, shortcut, branch, tie


def _begun_late(graph: Graph, residual: Residual, before: list[Residual]) -> Residual:
    """The same with the sum of another stream for its fork, if its branch is made from that alone, as in RevNet.

    In `a = a + f(b)`, `b = b + g(a)` the branch of the second sum is g.
    """
    path = graph.between(residual.fork, residual.branch)
    for total in sorted({r.sum for r in before} & path, reverse=True):
        after = graph.between(total, residual.branch)
        elsewhere = (path - after - {total}) | {residual.fork}
        alone = elsewhere.isdisjoint(i for value in after for i in graph.values[value].inputs)
        if alone and graph.reaches_output([total], around={residual.branch, residual.entry}):
            return replace(residual, fork=total)
    return residual


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
    if values[residual.sum].op in ops.SUBTRACT and not any(values[i].op in ops.WEIGHTED | ops.MIXING for i in path):
        return "branch has no layers"  # the time loop of RWKV
    if values[graph.strip(residual.branch)].op == "detach":
        return "branch learns nothing"  # the straight-through estimator
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


def passed_over(graph: Graph, residuals: list[Residual], rejected: list[Rejection]) -> list[Rejection]:
    """Of additions that are no residual sums those in the midst of a stream of such, as in a highway block."""
    streams = {graph.strip(i) for r in residuals for i in (r.shortcut, r.sum)}
    goes_on = {graph.strip(r.shortcut) for r in residuals}

    def on_stream(index: int) -> bool:
        node = graph.values[graph.strip(index)]
        scaled = node.op in ops.SCALE and any(map(on_stream, node.inputs))
        return node.is_data and (node.index in streams or scaled)

    return [
        rejection
        for rejection in rejected
        if rejection.reason in _NOT_TOLD_APART
        and graph.strip(rejection.sum) in goes_on
        and any(map(on_stream, graph.values[rejection.sum].inputs))
    ]


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
