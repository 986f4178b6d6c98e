"""`rdp.traced` and what hooks do for a compiler, run by Python: the steps that a compiler records are the oracle's."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
from collections.abc import Iterator

import pytest
import torch
from laws.architectures import BlockMLP, ConvNet, LoopMLP, Transformer
from laws.strategies import Case
from laws.training import loss
from torch import Tensor, nn

import rdp
from rdp import traced

CASE = Case(BlockMLP, (("plain", "norm"),), decay="constant", seed=3)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Code asks whether it is being compiled; it is told so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(CASE, id="row"),
        pytest.param(Case(BlockMLP, (("plain", "in_place"),), mode="batch", decay="constant", seed=3), id="batch"),
        pytest.param(
            Case(BlockMLP, (("plain", "norm"),), mode="batch", freeze="params", decay="constant", seed=3), id="params"
        ),
        pytest.param(Case(LoopMLP, (3,), scale_by_keep=True, rate=0.3, decay="linear", seed=1), id="scaled"),
        pytest.param(Case(BlockMLP, (("post_activation",) * 2,), decay="constant", seed=3), id="activation"),
        pytest.param(Case(ConvNet, ("basic", (1, 2)), decay="constant", seed=3), id="convolutions"),
        pytest.param(Case(Transformer, ("tuple_attention", 2), decay="constant", seed=3), id="outputs in tuples"),
    ],
)
def test_the_steps_of_a_compiled_graph_are_the_oracles(case):
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    assert not handle._run.watch.compiled
    dropped = 0
    for step in range(6):
        x = model.rows(5, step)
        with compiling():
            output = model(x)
        assert handle._run.traced_masks is None, "the forward is over"
        dropped += int((~handle.masks).sum())
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected)
        loss(output).backward()
        loss(expected).backward()
        frozen = handle.frozen if case.freeze == "params" else ()  # by the optimizer, whatever their gradients are
        for name, p in model.named_parameters():
            if name in frozen:
                continue
            q = reference.get_parameter(name)
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(a, b)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()
    assert dropped
    assert handle._run.watch.compiled
    assert handle.check().facts[1].startswith("6 training forwards, 6 steps")


def test_parts_that_are_compiled_while_the_model_is_not(monkeypatch):
    """Regional compilation: masks are drawn by Python and gates are in compiled code."""
    monkeypatch.setattr(traced, "may_be_compiled", lambda: True)
    model = CASE.model()
    reference = copy.deepcopy(model)
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))

    def compiled(block: nn.Module, x: Tensor) -> Tensor:
        with compiling():
            return type(block).forward(block, x)

    for block in model.body:
        block.forward = functools.partial(compiled, block)
    for step in range(4):
        x = model.rows(5, step)
        with handle.paused():
            assert torch.equal(model(x), reference(x))
        output = model(x)
        torch.testing.assert_close(output, CASE.oracle(reference, x, handle.masks, handle.phase))
        assert not torch.equal(output, reference(x)) or handle.phase is rdp.Phase.FREEZE
        assert handle._run.traced_masks is None
        handle.advance()


class Shifted(nn.Module):
    """Its branch ends in a function of which 0 is not 0, so the block is gated as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.fc(x))


@pytest.mark.parametrize("context", [compiling, contextlib.nullcontext])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_whole_blocks(mode, context):
    torch.manual_seed(0)
    model = nn.Sequential(Shifted(), Shifted()).double()
    reference, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    handle = rdp.attach(model, 0.5, mode=mode, decay="constant", seed=3, example_inputs=x)
    assert all(point.of_block for branch in handle.branches for point in branch.gates)
    seen = set()
    for _ in range(8):
        with context():
            output = model(x)
        expected = x
        for block, keep in zip(reference, handle.masks[:, :, None], strict=True):
            branch = torch.sigmoid(block.fc(expected))
            learns = keep if handle.phase is rdp.Phase.DROP else ~keep
            frozen = 0 if handle.phase is rdp.Phase.DROP else branch.detach() * keep
            expected = expected + branch * learns + frozen
        torch.testing.assert_close(output, expected)
        seen |= {(handle.phase, *keep) for keep in handle.masks.all(1).unsqueeze(1).tolist()}
        for result in (output, expected):
            result.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(*(torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q)))
        handle.advance()
    assert len(seen) == (4 if mode == "batch" else 2), "kept and dropped ones in both phases"


def test_what_runs_plainly_also_when_compiled():
    model = CASE.model()
    reference = copy.deepcopy(model)
    handle = CASE.attach(model, rate=0.9, example_inputs=model.rows(2, 0))
    x = model.rows(6, 0)
    with compiling():
        assert not torch.equal(model(x), reference(x))
        with handle.paused():
            assert torch.equal(model(x), reference(x))
        with torch.no_grad():
            assert torch.equal(model(x), reference(x))
        model.eval()
        assert torch.equal(model(x), reference.eval()(x))
        model.train()
        handle._run.traced_masks = torch.zeros(2, 6, dtype=torch.bool)  # of a forward that was interrupted
        with handle.paused():
            assert torch.equal(model(x), reference.train()(x))
        assert torch.equal(model.body[0](model.stem(x)), reference.body[0](reference.stem(x)))
    assert handle._run.watch.forwards == 1


class ScalarFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, scale: Tensor, *, inputs: dict[str, Tensor]) -> Tensor:
        x = inputs["x"] * scale
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_rows_are_those_of_the_first_tensor_that_has_any():
    model = ScalarFirst()
    call = {"scale": torch.tensor(2.0), "inputs": {"x": torch.randn(3, 4, requires_grad=True)}}
    handle = rdp.attach(model, 0.5, example_inputs=call)
    with compiling():
        model(**call).sum().backward()
    assert handle.masks.shape == (2, 3)


def test_branches_must_be_known_before():
    model = CASE.model()
    CASE.attach(model)
    with compiling(), pytest.raises(rdp.BranchError) as error:
        model(model.rows(2, 0))
    assert str(error.value) == (
        "the model is compiled before its branches are known; pass example_inputs to rdp.attach, or call "
        "handle.discover(inputs), so that they are found beforehand"
    )


def test_the_operator_has_the_shape_that_a_compiler_is_told():
    """And its masks are its own: a later forward does not change them."""
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    x = model.rows(7, 0)
    masks = traced.begin_forward(x, handle._run.key, 2)
    told = traced.begin_forward(x.to("meta"), handle._run.key, 2)
    assert (told.shape, told.dtype) == (masks.shape, masks.dtype) == ((2, 7), torch.bool)
    assert masks.device.type == "cpu"
    assert torch.equal(masks, handle.masks)
    assert masks.data_ptr() != handle.masks.data_ptr()


def test_a_run_is_known_by_its_key_for_as_long_as_it_lives():
    model, other = CASE.model(), CASE.model()
    runs = [CASE.attach(m)._run for m in (model, other)]
    keys = [run.key for run in runs]
    assert [traced._runs[key] for key in keys] == runs
    assert keys[0] != keys[1]
    del runs, model, other
    gc.collect()
    assert not set(keys) & set(traced._runs)


def test_without_a_compiler_nothing_is_asked_of_it(monkeypatch):
    """Where `torch._dynamo` was never imported there is nothing to forget, and it is not imported for that."""
    asked = []

    class Dynamo:
        @staticmethod
        def reset() -> None:
            asked.append("reset")

        @staticmethod
        def disable(function):
            asked.append("disable")
            return function

    monkeypatch.setattr(torch, "_dynamo", Dynamo)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert not traced.may_be_compiled()
    traced.forget_compiled()
    assert traced.uncompiled(divmod, 7, 2) == (3, 1)
    assert asked == []
    monkeypatch.setitem(sys.modules, "torch._dynamo", Dynamo)
    assert traced.may_be_compiled()
    traced.forget_compiled()
    assert traced.uncompiled(divmod, 7, 2) == (3, 1)
    assert asked == ["reset", "disable"]
