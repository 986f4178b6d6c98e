"""`torch.compile`: the oracle's outputs and gradients, one graph for each phase, and no recompilation after that."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rdp
from laws.architectures import BlockMLP, ConvNet, Transformer
from laws.oracle import oracle_forward
from laws.strategies import Case
from laws.training import loss


class Graphs:
    """A backend that runs graphs as they are and counts those of the model, not the one that draws masks."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        self.made += any("weight" in node.name for node in graph.graph.nodes if node.op == "placeholder")
        return graph.forward


pytestmark = pytest.mark.usefixtures("fresh_compiler")


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


@pytest.mark.parametrize("in_blocks", [False, True], ids=["whole", "by block"])
@pytest.mark.parametrize("scale_by_keep", [False, True])
@pytest.mark.parametrize("case", [ROW, replace(ROW, arguments=("post_norm", 2)), CONV], ids=["pre", "post", "conv"])
def test_no_graph_is_made_for_another_rate(case, scale_by_keep, in_blocks):
    """One for the plain cycle, and one for each phase."""
    case = replace(case, scale_by_keep=scale_by_keep)
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0), rate_schedule=lambda step: min(step / 8, 1))
    graphs = Graphs()
    for part in (
        dict.fromkeys(model.get_submodule(branch.block) for branch in handle.branches) if in_blocks else [model]
    ):
        part.compile(backend=graphs)
    made = []
    for step in range(12):
        x = model.rows(4, step)
        output = model(x)
        phase = handle.phase.name if any(handle.rates) else "PLAIN"
        expected = oracle_forward(reference, x, handle.masks, phase, handle.rates, "output", scale_by_keep)
        torch.testing.assert_close(output, expected)
        loss(output).backward()
        model.zero_grad()
        handle.advance()
        made.append(graphs.made)
    assert made[4:] == made[3:4] * 8
    assert made[3] == 3 * made[0]
    assert handle.check().ok or case is CONV, str(handle.check())


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
def test_blocks_compiled_one_by_one_make_two_or_three_graphs_each_in_fifty_steps(mode, sampling):
    """Regional compilation: one graph for DROP and one for FREEZE in each block, whatever the masks are.

    In batch mode one in which the branch is dropped, one in which it is frozen, and one in which it is as ever.
    """
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
    assert [backend.made for backend in graphs] == [3 if mode == "batch" else 2] * len(graphs)


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


# -- a graph serves those modules alone that have its hooks -----------------------------------------------------------

LINEAR = [
    pytest.param(Case(BlockMLP, (("plain",) * 3,), rate=0.8, seed=3), id="mlp"),
    pytest.param(Case(BlockMLP, (("norm",) * 3,), rate=0.8, mode="batch", seed=4), id="mlp-batch"),
    pytest.param(Case(ConvNet, ("basic", (1, 1)), rate=0.8, seed=3), id="conv"),
    pytest.param(Case(Transformer, ("pre_norm", 2), rate=0.8, seed=3), id="transformer"),
]
"""With rates that grow from 0: the first block has no hook, and is otherwise as the others are."""


def _in_a_new_module(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def _in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def _by_block(model: nn.Module, backend: str) -> nn.Module:
    for block in model.body:
        block.compile(backend=backend)
    return model


WAYS = [_in_a_new_module, _in_place, _by_block]
PAIRS = [
    pytest.param(*c.values, way, id=f"{c.id}-{way.__name__.strip('_')}", marks=pytest.mark.slow if k == i % 2 else ())
    for i, c in enumerate(LINEAR)
    for k, way in enumerate(WAYS)
]
"""All ways for all cases; of the two that compile a model as a whole, one is slow, as it makes the same graphs."""
BACKENDS = [
    *(pytest.param(*pair.values, "eager", id=pair.id, marks=pair.marks) for pair in PAIRS),
    *(
        pytest.param(*LINEAR[0].values, way, name, id=f"{name}-{way.__name__.strip('_')}", marks=pytest.mark.slow)
        for name in ("aot_eager", "inductor")
        for way in WAYS
    ),
]


def trains_as_the_oracle(case: Case, compiled: nn.Module, model: nn.Module, handle: rdp.ResidualDropPath) -> None:
    """A cycle of training."""
    reference = copy.deepcopy(model)
    dropped = 0
    for step in range(2):
        x = model.rows(6, step)
        output = compiled(x)
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected)
        loss(output).backward()
        loss(expected).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(*(torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q)))
        model.zero_grad()
        reference.zero_grad()
        dropped += int((~handle.masks).sum())
        handle.advance()
    assert dropped
    assert not any("never reached" in problem for problem in handle.check().problems)


@pytest.mark.parametrize(("case", "way", "backend"), BACKENDS)
def test_graphs_of_a_plain_twin_and_of_ungated_blocks_are_not_used_by_gated_ones(case, way, backend):
    """A plain twin (a baseline, a teacher) may be called before, after and in between, in training and evaluation."""
    model = case.model()
    twin, x = copy.deepcopy(model), model.rows(6, 9)
    handle = case.attach(model, example_inputs=x)
    compiled, compiled_twin = way(model, backend), way(twin, backend)

    def plain(call: nn.Module, module: nn.Module) -> None:
        expected = copy.deepcopy(module)(x)
        torch.testing.assert_close(call(x), expected)

    for twin_first in (True, False):
        torch._dynamo.reset()
        if twin_first:
            plain(compiled_twin, twin)
        trains_as_the_oracle(case, compiled, model, handle)
        for call, module in ((compiled_twin, twin), (compiled, model)):
            plain(call, module.eval())
            module.train()
        plain(compiled_twin, twin)
        trains_as_the_oracle(case, compiled, model, handle)


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_compiled_before_attach_and_attached_again(case, way):
    model = case.model()
    x = model.rows(6, 0)
    plain = model(x).detach()
    compiled = way(model, "eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain)
        handle = case.attach(model, example_inputs=x)
        trains_as_the_oracle(case, compiled, model, handle)
        handle.remove()
        torch.testing.assert_close(compiled(x), plain)


@pytest.mark.parametrize("case", LINEAR)
def test_a_teacher_and_its_student_are_compiled_and_attached_both(case):
    student, teacher = case.model(), case.model()
    handles = [case.attach(model, example_inputs=model.rows(2, 0)) for model in (student, teacher)]
    compiled = [_by_block(model, "eager") for model in (student, teacher)]
    for _ in range(2):
        for model, call, handle in zip((student, teacher), compiled, handles, strict=True):
            trains_as_the_oracle(case, call, model, handle)
    handles[0].remove()
    trains_as_the_oracle(case, compiled[1], teacher, handles[1])


@pytest.mark.filterwarnings("ignore:.*recompile_limit")
def test_more_blocks_than_torch_makes_graphs_for_are_masked_all_the_same():
    """Above the limit of torch it runs Python, which is right as well."""
    case = Case(BlockMLP, (("plain", "norm") * 6,), rate=0.8, seed=3)
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    compiled = _by_block(model, "eager")
    for _ in range(3):
        trains_as_the_oracle(case, compiled, model, handle)


class BreaksGraphs(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


@torch._dynamo.config.patch(cache_size_limit=1)
@pytest.mark.filterwarnings("ignore:.*recompile_limit", "ignore::rdp.RdpWarning")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="dense", marks=pytest.mark.slow),
        pytest.param({"mode": "batch"}, id="batch", marks=pytest.mark.slow),
        pytest.param({"sampling": "fixed", "compute": "rows"}, id="rows"),
    ],
)
def test_where_torch_gives_up_on_parts_of_a_compiled_model_they_are_gated_in_python(options):
    """Each block is in several graphs, of which there are more than torch may make."""
    case = Case(Transformer, ("pre_norm", 3), rate=0.25, decay="constant", seed=3, **options)
    model = case.model()
    for module in model.body.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = BreaksGraphs
    twin = copy.deepcopy(model)
    handles = [case.attach(each, example_inputs=model.rows(2, 0)) for each in (model, twin)]
    optimizers = [
        h.wrap(torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9))
        for h, m in zip(handles, (model, twin), strict=True)
    ]
    model.compile(backend="eager")
    for number in range(6):
        outputs = [each(each.rows(8, number)) for each in (model, twin)]
        torch.testing.assert_close(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            loss(output).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert handles[0].check().ok, str(handles[0].check())


def test_what_a_compiled_model_does_not_call_any_more_is_reported():
    case = LINEAR[0].values[0]
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    gone, model.aside, model.body = handle.branches[2].name, model.body[2], model.body[:2]
    torch.compile(model, backend="eager")(model.rows(4, 0))
    (problem,) = [text for text in handle.check().problems if "never reached" in text]
    assert gone in problem
    assert handle.branches[1].name not in problem


SETTING = """
import gc
import rdp, torch
from torch import nn

class Block(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)

def attached():
    return rdp.attach(nn.Sequential(Block(3, 3), Block(3, 3)), 0.5, example_inputs=torch.randn(2, 3), branches=["1"])

config = torch._dynamo.config
for users in (True, False):
    with config.patch(skip_nnmodule_hook_guards=users):
        first, second = attached(), attached()
        assert not config.skip_nnmodule_hook_guards
        first.remove()
        assert not config.skip_nnmodule_hook_guards
        del second
        gc.collect()
        assert config.skip_nnmodule_hook_guards is users
"""


def test_torch_has_its_setting_back_when_no_model_is_attached():
    # In a process of its own: here, models of other tests may still be attached.
    subprocess.run([sys.executable, "-W", "ignore", "-c", SETTING], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a GPU")
@pytest.mark.parametrize("by_block", [False, True], ids=["rows, whole", "batch, by block"])
def test_cuda_graphs_do_not_replay_the_masks_of_their_recording(by_block):
    options = {"mode": "batch"} if by_block else {"sampling": "fixed", "compute": "rows"}
    case = Case(Transformer, ("pre_norm", 2), rate=0.25, decay="constant", seed=3, dtype=torch.float32, **options)
    models = [case.model().cuda() for _ in range(2)]
    handles = [case.attach(model, example_inputs=model.rows(2, 0).cuda()) for model in models]
    wrapped = [
        handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01)) for handle, model in zip(handles, models, strict=True)
    ]
    for part in models[0].body if by_block else models[:1]:
        part.compile(mode="reduce-overhead")
    for step in range(40):
        torch.compiler.cudagraph_mark_step_begin()
        for model, optimizer in zip(models, wrapped, strict=True):
            loss(model(model.rows(8, step).cuda()).cpu()).backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


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
