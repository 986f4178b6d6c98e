"""Several models at once, one inside another, exported, traced, quantized, on meta, compiled; and no leaks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from laws.architectures import Architecture, BlockMLP, ConvNet, LoopMLP, Transformer
from laws.strategies import Case
from laws.training import anatomy, identical
from torch import Tensor, nn

import rdp

CASES = [
    Case(BlockMLP, (("plain", "norm"),), decay="constant", seed=2, dtype=torch.float32),
    Case(ConvNet, ("basic", (1, 2)), decay="constant", seed=2, dtype=torch.float32),
    Case(Transformer, ("pre_norm", 2), decay="constant", seed=2, dtype=torch.float32),
]
CASE = CASES[0]


def train(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        model(model.rows(3, step)).square().sum().backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# -- several models ----------------------------------------------------------------------------------------------------


def test_two_attached_models_do_not_disturb_each_other():
    """A GAN's pair, stepped in turn: each has its own phase, masks and frozen parameters, as if it were alone."""
    alone = []
    for case in CASES[:2]:
        model = case.model()
        handle = case.attach(model)
        train(model, handle.wrap(sgd(model)), 5)
        alone.append((copy.deepcopy(model.state_dict()), handle.state_dict()))

    models = [case.model() for case in CASES[:2]]
    handles = [case.attach(model) for case, model in zip(CASES[:2], models, strict=True)]
    optimizers = [handle.wrap(sgd(model)) for handle, model in zip(handles, models, strict=True)]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(model.rows(3, step)).square().sum().backward()
            optimizer.step()
    for model, handle, (weights, state) in zip(models, handles, alone, strict=True):
        assert identical(dict(model.state_dict()), dict(weights))
        assert identical(handle.state_dict(), state)
        assert handle.check().ok


class Distilled(nn.Module):
    """A student with an attached teacher inside its loss."""

    def __init__(self, student: Architecture, teacher: Architecture) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x) - target


def test_an_attached_model_inside_another_that_is_not_attached():
    student, teacher = CASE.model(), CASE.model().eval()
    handle, other = CASE.attach(student), CASE.attach(teacher, seed=9)
    both = Distilled(student, teacher)
    x = student.rows(4, 0)
    output = both(x)
    expected = CASE.oracle(CASE.model(), x, handle.masks, handle.phase) - CASE.model().eval()(x)
    torch.testing.assert_close(output, expected)
    assert other.masks.numel() == 0, "a forward without gradients in eval mode draws no mask"


def test_a_model_that_runs_inside_its_own_forward_hook_is_gated_by_its_own_forward():
    """The hook's evaluation of the same model in eval mode neither counts nor ends the forward around it."""
    model, reference = CASE.model(), CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))

    def evaluate(module: nn.Module, args: object) -> None:
        model.eval()
        with torch.no_grad():
            model(model.rows(2, 5))
        model.train()

    model.body[1].register_forward_pre_hook(evaluate, prepend=True)
    once = model.body[1]._forward_pre_hooks
    key = next(iter(once))
    hook = once.pop(key)
    x = model.rows(4, 1)
    called = []

    def first_time_only(module: nn.Module, args: object) -> None:
        if not called:
            called.append(True)
            hook(module, args)

    once[key] = first_time_only
    output = model(x)
    assert called
    torch.testing.assert_close(output, CASE.oracle(reference, x, handle.masks, handle.phase))


# -- other forms of a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture.__name__)
def test_export_and_jit_trace_of_an_attached_model_in_eval_mode_are_the_plain_model(case):
    model = case.model()
    x = model.rows(3, 0)
    handle = case.attach(model, example_inputs=x)
    train(model, handle.wrap(sgd(model)))
    model.eval()
    expected = copy.deepcopy(model)(x)
    assert torch.equal(torch.export.export(model, (x,), strict=False).module()(x), expected)
    assert torch.equal(torch.jit.trace(model, (x,))(x), expected)
    assert handle.step_count == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_model_says_what_it_cannot_do():
    """Dynamic quantization replaces Linear by a module whose weights are no parameters: nothing could learn."""
    case = Case(BlockMLP, (("plain", "plain"),), dtype=torch.float32)
    model = torch.ao.quantization.quantize_dynamic(case.model().eval(), {nn.Linear}).train()
    with pytest.raises(rdp.BranchError, match="no residual branch"):
        rdp.attach(model, 0.5, example_inputs=case.model().rows(2, 0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_traced_model_is_refused_like_a_scripted_one():
    model = CASE.model().eval()
    traced = torch.jit.trace(model, (model.rows(2, 0),))
    with pytest.raises(rdp.AttachError, match="scripted"):
        rdp.attach(traced)


def test_on_meta_branches_are_found_and_a_forward_runs():
    with torch.device("meta"):
        model = BlockMLP(("plain", "norm")).train()
    x = torch.empty(3, *model.row_shape, device="meta")
    handle = rdp.attach(model, 0.5, example_inputs=x)
    assert [b.name for b in handle.branches] == [
        b.name for b in CASE.attach(CASE.model(), example_inputs=CASE.model().rows(2, 0)).branches
    ]
    assert all(branch.compute == "dense" for branch in handle.branches)
    assert model(x).shape == (3, 2)
    handle.remove()


def test_attach_on_meta_and_then_materialize():
    with torch.device("meta"):
        model = BlockMLP(("plain", "norm"))
    handle = rdp.attach(model, 0.5, decay="constant")
    model.to_empty(device="cpu").train()
    model.load_state_dict(CASE.model().float().state_dict())
    x = model.rows(4, 0)
    torch.testing.assert_close(model(x), CASE.oracle(CASE.model(), x, handle.masks, handle.phase))


# -- leaks -------------------------------------------------------------------------------------------------------------


def test_attaching_and_removing_a_hundred_times_leaves_nothing():
    model = CASE.model()
    before = anatomy(model)
    handles = []
    for step in range(100):
        handle = CASE.attach(model, example_inputs=model.rows(2, 0) if step % 2 else None)
        handles.append(weakref.ref(handle))
        optimizer = handle.wrap(sgd(model))
        if step % 10 == 0:
            train(model, optimizer)
        optimizer.zero_grad()
        handle.remove()
        assert anatomy(model) == before
    del handle, optimizer
    gc.collect()
    assert not any(reference() for reference in handles)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_step_leaves_no_tensor_behind(mode):
    case = Case(Transformer, ("pre_norm", 2), decay="constant", mode=mode, seed=2)
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(sgd(model))

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), Tensor) for item in gc.get_objects())  # isinstance asks dead proxies too

    counts = []
    for _ in range(6):
        train(model, optimizer, 4)
        optimizer.zero_grad()
        counts.append(tensors())
    assert counts[-1] <= counts[1], counts


def test_a_forgotten_model_is_freed_with_its_handle():
    model = CASE.model()
    handle = CASE.attach(model)
    train(model, handle.wrap(sgd(model)))
    references = [weakref.ref(model), weakref.ref(handle)]
    del model, handle
    gc.collect()
    assert not any(reference() for reference in references)


LOOP = Case(LoopMLP, (3,), decay="constant", seed=2)


@pytest.mark.parametrize("before", [True, False], ids=["attach_then_wrap", "wrap_then_attach"])
def test_attach_to_what_torch_compile_returns(before):
    """The compiled wrapper is a module of its own around the model; either may be attached to."""
    model = LOOP.model()
    reference = copy.deepcopy(model)
    if before:
        handle = LOOP.attach(model, example_inputs=model.rows(2, 0))
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        handle = LOOP.attach(compiled, example_inputs=model.rows(2, 0))
    for step in range(2):
        x = model.rows(4, step)
        output = compiled(x)
        torch.testing.assert_close(output, LOOP.oracle(reference, x, handle.masks, handle.phase))
        handle.advance()
    handle.remove()
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_block_that_is_given_its_input_by_keyword_is_masked_as_a_whole(mode):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, *, x: Tensor) -> Tensor:
            return x + (x @ self.weight).sigmoid()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x=self.a(x=x))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 4)
    handle = rdp.attach(model, 0.5, mode=mode, decay="constant", example_inputs=x)
    for _ in range(4):
        output, expected = model(x), x
        for block, mask in zip((model.a, model.b), handle.masks, strict=True):
            branch = (expected @ block.weight).sigmoid()
            expected = expected + (branch if handle.phase is rdp.Phase.FREEZE else mask[:, None] * branch)
        torch.testing.assert_close(output, expected)
        handle.advance()
