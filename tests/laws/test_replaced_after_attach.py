"""What is replaced after `attach` is followed: to attach and then replace is to replace and then attach, bit by bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

import rdp
from laws import architectures as arch
from laws.strategies import Case
from laws.training import identical, loss, snapshot

CASES = [
    Case(arch.BlockMLP, (("plain", "norm", "plain"),), decay="constant", compute="dense", seed=1),
    Case(arch.Transformer, ("parallel", 2), decay="constant", compute="dense", seed=1),
    Case(arch.TorchTransformer, (2, True, True, 0.0), decay="constant", compute="dense", seed=1),
    Case(arch.ConvNet, ("basic", (1, 2)), decay="constant", compute="dense", seed=1),
    Case(arch.NestedMLP, ((True, False),), decay="constant", compute="dense", seed=1),
]


class Adapted(nn.Module):
    """A layer with a low-rank one beside it, as LoRA's."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        kind = {"bias": False, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, **kind)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, **kind)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Normalized(nn.Module):
    """Another class of normalization over the same or other parameters."""

    def __init__(self, old: nn.Module, keep: bool) -> None:
        super().__init__()
        self.weight = old.weight if keep else nn.Parameter(old.weight.detach() * 2)
        self.bias = old.bias if keep else nn.Parameter(old.bias.detach() + 1)
        self.batch = isinstance(old, nn.BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch:
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def exchange(model: nn.Module, kind: type | tuple[type, ...], make: Callable[[Any], nn.Module]) -> None:
    """Put something else in the place of every module of a kind."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind) and not isinstance(module, nn.MultiheadAttention):
                setattr(module, name, make(child))


LAYERS = (nn.Linear, nn.Conv2d)
NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in LAYERS]


def pruned(model: nn.Module) -> None:
    for layer in layers(model):
        prune.l1_unstructured(layer, "weight", amount=0.5)


def pruned_for_good(model: nn.Module) -> None:
    pruned(model)
    for layer in layers(model):
        prune.remove(layer, "weight")


def parametrized(model: nn.Module) -> None:
    for layer in layers(model):
        parametrize.register_parametrization(layer, "weight", Halved())


def weight_normed(model: nn.Module) -> None:
    for layer in layers(model):
        parametrizations.weight_norm(layer)


def wrapped(model: nn.Module) -> None:
    for parent in [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]:
        for name, child in list(parent.named_children()):
            parent[int(name)] = checkpoint_wrapper(child)


CHANGES = {
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "parametrized": parametrized,
    "weight normed": weight_normed,
    "wrapped in checkpoints": wrapped,
    "adapters": lambda model: exchange(model, nn.Linear, Adapted),
    "other normalization, same parameters": lambda model: exchange(model, NORMS, lambda old: Normalized(old, True)),
    "other normalization and parameters": lambda model: exchange(model, NORMS, lambda old: Normalized(old, False)),
}


def change(model: nn.Module, what: str) -> None:
    torch.manual_seed(0)
    CHANGES[what](model)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def train(model: nn.Module, handle: rdp.ResidualDropPath, steps: int) -> list[Any]:
    optimizer, seen = handle.wrap(sgd(model)), []
    for number in range(steps):
        optimizer.zero_grad(set_to_none=False)
        loss(model(model.rows(4, number))).backward()
        seen.append((handle.phase, handle.masks, sorted(handle.frozen)))
        optimizer.step()
    return [*seen, snapshot(model, optimizer)]


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture.__name__)
def test_to_attach_and_replace_is_to_replace_and_attach(case, what, mode):
    model = case.model()
    handle = case.attach(model, mode=mode, example_inputs=model.rows(2, 0))
    train(model, handle, 3)
    twin = copy.deepcopy(model)
    change(twin, what)
    other = case.attach(twin, mode=mode, example_inputs=twin.rows(2, 0))
    other.load_state_dict(handle.state_dict() | {"branches": [branch.name for branch in other.branches]})
    change(model, what)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        ours, theirs = train(model, handle, 6), train(twin, other, 6)
    assert identical(ours, theirs)
    assert any(frozen for _, _, frozen in ours[:-1]) or mode == "row"
    assert handle.check().ok, str(handle.check())
    assert [set(b.parameters) for b in handle.branches] == [set(b.parameters) for b in other.branches]
    before = dict(model.named_modules())
    handle.remove()
    assert not any(module._forward_hooks for module in before.values() if not hasattr(module, "weight_orig"))


@pytest.mark.parametrize("what", ["adapters", "other normalization, same parameters"])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.architecture.__name__)
def test_a_branch_on_rows_whose_modules_are_replaced_runs_dense_as_the_table_says(case, what):
    model = case.model()
    handle = case.attach(model, compute="auto", example_inputs=model.rows(2, 0))
    on_rows = [branch.compute == "rows" for branch in handle.branches]
    change(model, what)
    train(model, handle, 4)
    for was, branch in zip(on_rows, handle.branches, strict=True):
        if was and branch.compute == "dense":
            assert "dense: its modules were replaced after attach" in str(handle)
    assert any(on_rows)
    assert handle.check().ok


@pytest.mark.parametrize("what", ["pruned", "parametrized", "wrapped in checkpoints"])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.architecture.__name__)
def test_a_branch_on_rows_whose_modules_stay_goes_on_so(case, what):
    model = case.model()
    handle = case.attach(model, compute="auto", example_inputs=model.rows(2, 0))
    before = [branch.compute for branch in handle.branches]
    assert "rows" in before
    change(model, what)
    train(model, handle, 4)
    assert [branch.compute for branch in handle.branches] == before


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.architecture.__name__)
def test_a_branch_that_is_taken_out_and_put_in_again_is_the_same(case):
    """As where a model grows while it trains."""
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    before = handle.branches
    parent, _, key = handle.branches[-1].block.rpartition(".") if handle.branches[-1].block else ("layers", "", "0")
    parts = model.get_submodule(parent)
    last = parts._modules.pop(key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, handle, 2)
    parts._modules[key] = last
    train(model, handle, 2)
    assert handle.branches == before
    assert handle.check().ok, str(handle.check())


def test_what_is_gone_is_told_in_the_next_forward():
    for case in CASES[:3]:
        model = case.model()
        handle = case.attach(model, example_inputs=model.rows(2, 0))
        name = handle.branches[0].name
        parent, _, key = name.rpartition(".")
        gone = model.get_submodule(name)
        model.get_submodule(parent)._modules.pop(key)
        object.__setattr__(model.get_submodule(parent), key, gone)
        with pytest.warns(rdp.RdpWarning, match=rf"`{name}` ended a branch and is not in the model any more"):
            model(model.rows(2, 0))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_blocks_that_are_compiled_after_attach(mode):
    """`model.blocks[i] = torch.compile(model.blocks[i])` trains as without it."""
    trained = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = arch.BlockMLP(("plain", "scaled", "plain")).double()
        handle = rdp.attach(model, 0.5, decay="constant", mode=mode, seed=3, example_inputs=model.rows(2, 0))
        optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for index in range(3 if compiled else 0):
            model.body[index] = torch.compile(model.body[index], backend="eager")
        for step in range(6):
            optimizer.zero_grad()
            model(model.rows(4, step)).square().mean().backward()
            optimizer.step()
        assert handle.check().ok
        trained.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*trained)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "make", [lambda: arch.BlockMLP(("plain", "scaled")), lambda: arch.LoopMLP(2), lambda: arch.FoldedMLP(2)]
)
def test_what_gets_a_state_runs_dense(make):
    """Spectral normalisation moves its state on in every call, and a branch on rows is called twice in FREEZE."""
    torch.manual_seed(0)
    model = make()
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(3, 0))
    assert {branch.compute for branch in handle.branches} == {"rows"}
    for layer in layers(model):
        parametrizations.spectral_norm(layer)
    model(model.rows(3, 0)).sum().backward()
    assert {branch.compute for branch in handle.branches} == {"dense"}


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_that_is_deleted_from_a_list_is_told_though_the_next_moves_into_its_place(index):
    for blocks in (("plain",) * 3, ("scaled", "plain", "plain"), ("plain", "scaled", "plain", "plain")):
        model = arch.BlockMLP(blocks).double()
        handle = rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(2, 0))
        name = handle.branches[index].name
        train(model, handle, 2)
        del model.body[index]
        with pytest.warns(rdp.RdpWarning, match=rf"`{name}` ended a branch and is not in the model any more"):
            model(model.rows(2, 0))
        assert not handle.check().ok
