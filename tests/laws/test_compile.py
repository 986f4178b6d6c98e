"""`torch.compile`: the oracle's outputs and gradients, one graph for each phase, and no recompilation after that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rdp
from laws.architectures import BlockMLP, ConvNet, Transformer
from laws.strategies import Case
from laws.training import loss


class Graphs:
    """A backend that runs graphs as they are and counts those of the model, not the one that draws masks."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        self.made += any("weight" in node.name for node in graph.graph.nodes if node.op == "placeholder")
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


ROW = Case(Transformer, ("pre_norm", 1), decay="constant", seed=3)
BATCH = Case(BlockMLP, (("plain", "in_place"),), mode="batch", decay="constant", seed=3)
CONV = Case(ConvNet, ("basic", (2,)), decay="constant", seed=3)


@pytest.mark.parametrize(
    ("case", "in_place"),
    [
        pytest.param(ROW, False, id="row-torch.compile(model)"),
        pytest.param(ROW, True, id="row-model.compile()"),
        pytest.param(BATCH, False, id="batch-torch.compile(model)"),
        pytest.param(CONV, False, id="conv-torch.compile(model)"),
    ],
)
def test_a_compiled_model_trains_as_the_oracle_with_a_graph_for_each_phase(case, in_place):
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    graphs = Graphs()
    compiled: nn.Module = model
    if in_place:
        model.compile(backend=graphs, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
    made = []
    for step in range(6):
        x = model.rows(4, step)
        output = compiled(x)
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected)
        loss(output).backward()
        loss(expected).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(a, b)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()
        made.append(graphs.made)
    assert made == [1] + [2] * 5, "one graph for DROP, one for FREEZE"


def test_a_model_compiled_and_called_before_attach_still_drops():
    """Hooks that come after the first compiled call are silently ignored, unless the compiler is told."""
    case = Case(BlockMLP, (("plain", "norm"),), rate=0.9, decay="constant", seed=3)
    model = case.model()
    compiled = torch.compile(model, backend="eager")
    x = model.rows(6, 0)
    plain = compiled(x)
    handle = case.attach(model, example_inputs=x)
    output = compiled(x)
    torch.testing.assert_close(output, case.oracle(case.model(), x, handle.masks, handle.phase))
    assert not torch.equal(output, plain)
    handle.remove()
    assert torch.equal(compiled(x), plain)


@pytest.mark.parametrize(("mode", "sampling"), [("row", "bernoulli"), ("row", "fixed"), ("batch", "bernoulli")])
def test_blocks_compiled_one_by_one_make_two_graphs_each_in_fifty_steps(mode, sampling):
    """Regional compilation: one graph for DROP and one for FREEZE in each block, whatever the masks are."""
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode=mode, sampling=sampling, decay="constant", seed=3)
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    graphs = [Graphs() for _ in model.body]
    for block, backend in zip(model.body, graphs, strict=True):
        block.compile(backend=backend, fullgraph=True)
    for step in range(50):
        x = model.rows(4, step)
        output = model(x)
        if step < 6 or step > 46:
            torch.testing.assert_close(output, case.oracle(reference, x, handle.masks, handle.phase))
        handle.advance()
    assert [backend.made for backend in graphs] == [2] * len(graphs)


class InnerMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


class InnerBlock(nn.Module):
    """As in timm's ViT, what is worth compiling lies between the module that is entered and the one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = nn.LayerNorm(8), InnerMLP(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_modules_inside_of_branches_run_on_rows_with_one_graph_for_each_number_of_rows(compile_first):
    torch.manual_seed(0)
    model = nn.Sequential(*(InnerBlock() for _ in range(3))).double()
    reference = copy.deepcopy(model)
    graphs = [Graphs() for _ in model]
    options = {"rate": 0.25, "decay": "constant", "sampling": "fixed", "example_inputs": torch.randn(2, 8).double()}

    def compile_inner() -> None:
        for block, backend in zip(model, graphs, strict=True):
            block.mlp.compile(backend=backend, fullgraph=True, dynamic=False)

    if compile_first:
        compile_inner()
    handle = rdp.attach(model, **options)
    assert [branch.compute for branch in handle.branches] == ["rows"] * 3
    assert [backend.made for backend in graphs] == [0] * 3  # looking for branches compiles nothing
    if not compile_first:
        compile_inner()
    dense = rdp.attach(reference, compute="dense", **options)
    for _ in range(50):
        x = torch.randn(16, 8, dtype=torch.float64)
        ours, expected = model(x), reference(x)
        torch.testing.assert_close(ours, expected)
        for output in (ours, expected):
            output.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            zero = torch.zeros_like(p)
            torch.testing.assert_close(zero if p.grad is None else p.grad, zero if q.grad is None else q.grad)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()
        dense.advance()
    assert [backend.made for backend in graphs] == [2] * 3, "12 undropped rows, and 4 dropped ones"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["default", "reduce-overhead"])
def test_compiled_to_machine_code(how):
    """The compiler's own backend, with CUDA graphs asked for (there are none on a CPU)."""
    case = Case(BlockMLP, (("plain", "norm"),), decay="constant", seed=3, dtype=torch.float32)
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    compiled = torch.compile(model, mode=how)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=1e-3))  # saturated tanh differs by compiler
    for step in range(50):
        x = model.rows(4, step)
        output = compiled(x)
        reference.load_state_dict(model.state_dict())
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        loss(output).backward()
        loss(expected).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        reference.zero_grad()
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames <= 3, "DROP, FREEZE, and at most one that was not used"
    assert handle.check().ok
