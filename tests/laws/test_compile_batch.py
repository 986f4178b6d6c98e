"""Compiled blocks in batch mode: a few graphs, shared by blocks that are alike, learn as in Python and save work."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import rdp
from laws.architectures import Architecture, BlockMLP, ConvNet, PreNormBlock, TorchTransformer, Transformer
from laws.graphs import counted, none_was_left_to_python, of_all
from laws.strategies import Case
from laws.training import identical, loss

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def made() -> int:
    """How many graphs torch has made."""
    return counters["stats"]["unique_graphs"]


def compiled_and_not(case: Case, model: Architecture, **changes: object):
    """A model whose blocks are compiled, another that is as it in all else, and their handles and optimizers."""
    twin = copy.deepcopy(model)
    handles = [case.attach(each, example_inputs=model.rows(2, 0), **changes) for each in (model, twin)]
    for block in model.body:
        block.compile(backend="eager", fullgraph=True)
    optimizers = [
        handle.wrap(torch.optim.SGD(each.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1))
        for handle, each in zip(handles, (model, twin), strict=True)
    ]
    return model, twin, handles, optimizers


def step(models: tuple[Architecture, Architecture], optimizers, rows: int, number: int) -> None:
    """One of each, in which both make the same of the same batch."""
    outputs = [model(model.rows(rows, number)) for model in models]
    torch.testing.assert_close(*outputs)
    for output, optimizer in zip(outputs, optimizers, strict=True):
        loss(output).backward()
        optimizer.step()
        optimizer.zero_grad()


SHARED = [
    pytest.param(Case(Transformer, ("pre_norm", 6), rate=0.3), 7, id="pre_norm"),
    pytest.param(Case(TorchTransformer, (3, False, True), rate=0.3), 7, id="post_norm"),
    pytest.param(Case(BlockMLP, (("norm",) * 4,), scale_by_keep=True), 4, id="scaled"),
    pytest.param(Case(ConvNet, ("basic", (1, 1, 1))), 3, id="batch normalisation"),
]
"""And how many graphs there are of all blocks together."""


@pytest.mark.parametrize(("case", "graphs"), SHARED)
def test_blocks_that_are_alike_share_a_few_graphs_and_learn_as_in_python(case, graphs):
    """With a partial last batch and an evaluation in between, which torch makes graphs of their own for."""
    case = replace(case, mode="batch", decay="constant", seed=3)
    model, twin, handles, optimizers = compiled_and_not(case, case.model())
    limit = torch._dynamo.config.cache_size_limit
    for number in range(24):
        if number == 20:
            assert made() <= of_all(graphs, len(model.body))
            step((model, twin), optimizers, 3, number)
            x = model.eval().rows(4, 0)
            torch.testing.assert_close(model(x), twin.eval()(x))
            for each in (model, twin):
                each.train()
        step((model, twin), optimizers, 5, number)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert identical(handles[0].state_dict(), handles[1].state_dict())
    assert none_was_left_to_python()
    assert torch._dynamo.config.cache_size_limit == limit
    assert handles[0].check().ok, str(handles[0].check())


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        pytest.param({"decay": "linear"}, 8, id="a block of rate 0"),
        pytest.param({"freeze": "params"}, 4, id="params"),
        pytest.param({"phases": (rdp.Phase.DROP,)}, 4, id="DROP alone"),
        pytest.param({"rate_schedule": rdp.rate_schedules.linear(2, 6)}, 7, id="rates that change"),
    ],
)
def test_few_graphs_whatever_is_trained(changes, graphs):
    case = Case(Transformer, ("pre_norm", 3), rate=0.6, mode="batch", decay="constant", seed=3)
    model, twin, handles, optimizers = compiled_and_not(case, case.model(), **changes)
    for number in range(12):
        step((model, twin), optimizers, 4, number)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert made() <= of_all(graphs, len(model.body))
    assert none_was_left_to_python()
    assert handles[0].check().ok, str(handles[0].check())


def test_blocks_do_two_thirds_of_the_work():
    """The figure of docs/cost.md; `-s` prints it."""
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(32, 8, num_classes=10, embed_dim=48, depth=6, num_heads=3)
    flops, x = [0], torch.randn(40, 3, 32, 32)

    def work(model: nn.Module) -> int:
        flops[0] = 0
        model(x).square().mean().backward()
        return flops[0]

    plain, backend = copy.deepcopy(vit), counted(flops)
    for block in (*plain.blocks, *vit.blocks):
        block.compile(backend=backend, fullgraph=True)
    of_plain = work(plain)
    handle = rdp.attach(vit, 0.1, decay="constant", mode="batch", seed=3, example_inputs=x[:2])
    counters.clear()
    done: dict[str, list[float]] = {"DROP": [], "FREEZE": []}
    for _ in range(24):
        done[handle.phase.name].append(work(vit) / of_plain)
        handle.advance()
    drop, freeze = (sum(ratios) / len(ratios) for ratios in done.values())
    print(f"DROP {drop:.3f}, FREEZE {freeze:.3f}, mean {(drop + freeze) / 2:.3f} of plain")
    assert (drop + freeze) / 2 <= 0.72
    assert made() <= of_all(12, len(vit.blocks))
    assert none_was_left_to_python()


def test_what_is_not_called_any_more_is_reported_though_its_graphs_are_shared():
    case = Case(Transformer, ("pre_norm", 4), mode="batch", decay="constant", seed=3)
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    for block in model.body:
        block.compile(backend="eager", fullgraph=True)
    names = [branch.name for branch in handle.branches]
    model.aside, model.body = model.body[2], nn.ModuleList([*model.body[:2], model.body[3]])
    for number in range(2):
        loss(model(model.rows(4, number))).backward()
        handle.advance()
    (problem,) = [text for text in handle.check().problems if "never reached" in text]
    assert [name in problem for name in names] == [False] * 4 + [True] * 2 + [False] * 2


class Checkpointed(PreNormBlock):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpoints_inside_of_blocks():
    case = Case(Transformer, ("pre_norm", 3), rate=0.4, mode="batch", decay="constant", seed=3)
    model = case.model()
    for block in model.body:
        block.__class__ = Checkpointed
    model, twin, handles, optimizers = compiled_and_not(case, model)
    for number in range(8):
        step((model, twin), optimizers, 4, number)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert made() <= of_all(7, len(model.body))
    assert none_was_left_to_python()
    assert handles[0].check().ok, str(handles[0].check())


class Chain(nn.Sequential):
    """`nn.Sequential().compile()` leaves torch's own code to Python in torch 2.6 to 2.11, and compiles each block."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "three blocks"])
def test_what_has_too_many_branches_to_choose_among_graphs_runs_dense_and_that_is_said_once(whole):
    case = Case(BlockMLP, (("plain", "norm", "scaled"),), mode="batch", decay="constant", seed=3)
    model, twin = case.model(), case.model()
    model.body.__class__ = Chain
    handles = [case.attach(each, example_inputs=model.rows(2, 0)) for each in (model, twin)]
    (model if whole else model.body).compile(backend="eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", rdp.RdpWarning)
        for number in range(8):
            outputs = [each(each.rows(4, number)) for each in (model, twin)]
            torch.testing.assert_close(*outputs)
            for output, handle in zip(outputs, handles, strict=True):
                loss(output).backward()
                handle.advance()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(*(torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q)))
    (text,) = [str(each.message) for each in told if issubclass(each.category, rdp.RdpWarning)]
    assert ("Compile its blocks instead" if whole else "Compile smaller parts") in text
    assert made() <= 4
    assert none_was_left_to_python()


class AroundBlocks(Transformer):
    """Compiled blocks are run again in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.body:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"mode": "batch"}, id="batch"),
        pytest.param({}, id="dense", marks=pytest.mark.slow),
        pytest.param({"sampling": "fixed", "compute": "rows"}, id="rows"),
    ],
)
def test_a_checkpoint_around_compiled_blocks(options, reentrant):
    """Two micro-batches, whose blocks are run again in one backward."""
    case = Case(AroundBlocks, ("pre_norm", 2), rate=0.5, decay="constant", seed=3, **options)
    model = case.model()
    model.reentrant = reentrant
    model, twin, _, optimizers = compiled_and_not(case, model)
    for number in range(4):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            sum(loss(each(each.rows(4, 2 * number + part))) for part in range(2)).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
