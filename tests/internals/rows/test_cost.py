"""From how many rows of a batch on a branch gains from running on some of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rdp.branches import NEVER, Branch
from rdp.discovery.graph import Graph
from rdp.discovery.trace import Trace
from rdp.rows.cost import Work, fewest_rows, work

CPU = torch.device("cpu")
QUERIES, KEYS = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("layer", "shape", "operations", "numbers"),
    [
        (nn.Linear(8, 16), (2, 8), 2 * 8 * 16, 16),
        (nn.Linear(8, 16), (2, 5, 8), 5 * 2 * 8 * 16, 5 * 16),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), 25 * 2 * 9 * 4 * 6, 6 * 25),
        (nn.Conv1d(4, 4, 3, groups=2), (2, 4, 5), 3 * 2 * 3 * 2 * 4, 4 * 3),
        (nn.GELU(), (2, 8), 0, 8),
        (nn.LayerNorm(8), (2, 8), 0, 8),
    ],
    ids=str,
)
def test_operations_and_numbers_of_a_row_are_counted(layer: nn.Module, shape: tuple[int, ...], operations, numbers):
    graph = Graph(Trace(layer).run((torch.randn(shape),), {}))
    assert work(graph, range(1, len(graph.values)), [0]).operations == operations
    result = graph.outputs[0]
    assert work(graph, [result], [0, result]) == Work(operations, numbers, torch.tensor(shape[1:]).prod() + numbers, 1)


class Product(nn.Module):
    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        if keys.dim() == 4:
            return nn.functional.scaled_dot_product_attention(queries, keys, keys)
        return queries @ keys


@pytest.mark.parametrize(
    ("queries", "keys", "operations"),
    [(QUERIES, KEYS, 4 * 4 * 3 * 5 * 8), (QUERIES[:, 0], KEYS[:, 0].mT, 2 * 3 * 5 * 8)],
    ids=["attention", "matmul"],
)
def test_products_of_two_tensors_are_counted(queries: Tensor, keys: Tensor, operations: int):
    graph = Graph(Trace(Product()).run((queries, keys), {}))
    assert work(graph, graph.outputs, []).operations == operations


def test_the_more_work_the_fewer_rows_are_needed_and_what_only_moves_numbers_never_gains():
    rows = [fewest_rows(Work(10.0**n, 0, 0, 1), CPU) for n in range(3, 12)]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 1
    assert fewest_rows(Work(0, 10, 100, 1), CPU) == fewest_rows(Work(), CPU) == NEVER
    functions = [fewest_rows(Work(1e6, 0, 0, n), CPU) for n in (1, 10, 100)]
    assert functions == sorted(functions)
    assert fewest_rows(Work(1e8, 0, 0, 1), torch.device("cuda")) > fewest_rows(Work(1e8, 0, 0, 1), CPU)


@pytest.mark.parametrize("note", ["", "ambiguous", "rows from `f` on: why"])
@pytest.mark.parametrize(
    ("fewest", "small"),
    [(8, "dense: too small to gain with fewer than 8 rows"), (NEVER, "dense: too small to gain")],
)
def test_a_branch_says_how_it_runs_in_a_batch(note: str, fewest: int, small: str):
    branch = Branch("f", "", "identity", (), compute="rows", note=note, fewest=fewest)
    few, many = branch.sized(7), branch.sized(fewest)
    assert (few.compute, few.note) == ("dense", f"{note}, {small}" if note else small)
    assert many == branch == few.sized(fewest) == few.sized(7).sized(fewest)
    assert Branch("f", "", "identity", (), note=note).sized(1).note == note
