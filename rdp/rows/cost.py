"""Is a branch large enough to gain from running on some of its rows? Estimated from a trace; nothing is timed.

What is saved grows with the rows: two of the six parts of the work of a DROP and a FREEZE step, see docs/cost.md. What
it costs does not (Python, and FREEZE calls every function twice), but for moving rows. An accelerator works while the
host prepares what comes next, and to save work of the one that waits for the other saves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from rdp.branches import NEVER
from rdp.discovery import ops
from rdp.discovery.graph import Graph
from rdp.discovery.records import Value

_LEFT = 4
"""Of the six parts of the work of a cycle."""

_MOVES = 8
"""How often each number that enters or leaves the branch is read or written in a cycle, besides what dense does."""


@dataclass(frozen=True)
class _Speed:
    """Of a device: operations and numbers in a second; seconds for each branch and for each function, in a cycle.

    Rather too fast than too slow, since dense is never a loss.

    Attributes:
        operations: Floating point operations in a second.
        numbers: That are written in a second.
        branch: Seconds that a cycle takes longer for a branch on rows.
        function: The same for each of its functions.
        host: Seconds of a cycle for each function of a branch on rows, in which the host does not wait for the device;
            0 where they are one.
    """

    operations: float
    numbers: float
    branch: float
    function: float
    host: float


_CORE = _Speed(1e11, 2e9, 6e-4, 1e-5, 0.0)
_ACCELERATOR = _Speed(2e14, 1e12, 7e-4, 2e-5, 5e-4)
"""An H100 under autocast; its host took 2.8 ms for a cycle of a branch of ViT-S, docs/cost.md."""


@dataclass(frozen=True)
class Work:
    """What a branch does in a forward of one row.

    Attributes:
        operations: Floating point operations of layers with weights, and of products.
        numbers: That all functions put out.
        moved: Numbers that enter or leave the branch.
        functions: That are called, for any number of rows.
    """

    operations: float = 0.0
    numbers: float = 0.0
    moved: float = 0.0
    functions: int = 0


def work(graph: Graph, inside: Iterable[int], moved: Collection[int]) -> Work:
    """What these values of a forward of two rows take to be made, of which some are moved."""
    made = [graph.values[i] for i in inside if graph.values[i].op not in ops.VIEW | ops.SLICE]
    return Work(
        sum(_operations(graph, value) for value in made) / 2,
        sum(math.prod(value.shape) for value in made) / 2,
        sum(math.prod(graph.values[i].shape) for i in moved) / 2,
        len(made),
    )


def fewest_rows(done: Work, device: torch.device) -> int:
    """The fewest rows of a batch with which a branch gains from running on some of them."""
    speed, cores = (_CORE, torch.get_num_threads()) if device.type == "cpu" else (_ACCELERATOR, 1)
    row = (done.operations / speed.operations + done.numbers / speed.numbers) / cores
    saved = 2 * row - _MOVES * done.moved / speed.numbers / cores
    spent = speed.branch + done.functions * speed.function
    if saved * NEVER <= spent:
        return NEVER
    return math.ceil(max(spent / saved, done.functions * speed.host / (_LEFT * row)))


def _operations(graph: Graph, value: Value) -> float:
    size = math.prod(value.shape)
    inputs = [graph.values[i] for i in value.inputs]
    if value.op in ops.MIXING and len(inputs) > 1 and len(inputs[1].shape) > 1:
        # A product of two tensors; of attention both products.
        attention = value.op == "scaled_dot_product_attention"
        return 4.0 * size * inputs[1].shape[-2] if attention else 2.0 * size * inputs[0].shape[-1]
    weights = sum(math.prod(i.shape) for i in inputs if not i.is_data and len(i.shape) > 1)
    if not weights or len(value.shape) < 2:
        return 0.0
    return 2.0 * weights * size / max(value.shape[1 if "conv" in value.op else -1], 1)
