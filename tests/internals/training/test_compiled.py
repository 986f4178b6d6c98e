"""What is done for a compiler, run by Python: the steps that a compiler records are the oracle's."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP, LoopMLP, Transformer
from laws.strategies import Case
from laws.training import loss
from torch import Tensor, nn

import rdp
from rdp.training import compiled
from rdp.training.run import Run

CASE = Case(BlockMLP, (("plain", "norm"),), decay="constant", seed=3)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Code asks whether it is being compiled; it is told so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def same_gradients(model: nn.Module, reference: nn.Module, besides: tuple[str, ...] = ()) -> None:
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if name not in besides:
            torch.testing.assert_close(*(torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q)))


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(CASE, id="row"),
        pytest.param(
            Case(BlockMLP, (("plain", "norm"),), mode="batch", freeze="params", decay="constant", seed=3), id="params"
        ),
        pytest.param(Case(LoopMLP, (3,), scale_by_keep=True, rate=0.3, decay="linear", seed=1), id="scaled"),
        pytest.param(Case(BlockMLP, (("post_activation",) * 2,), decay="constant", seed=3), id="activation"),
        pytest.param(Case(Transformer, ("tuple_attention", 2), decay="constant", seed=3), id="outputs in tuples"),
    ],
)
def test_the_steps_of_a_compiled_graph_are_the_oracles(case):
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    ungated = {index for index, branch in enumerate(handle.branches) if branch.rate == 0}
    dropped = 0
    for step in range(6):
        x = model.rows(5, step)
        with compiling():
            output = model(x)
        assert handle._run.compiled is None, "the forward is over"
        dropped += int((~handle.masks).sum())
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected)
        loss(output).backward()
        loss(expected).backward()
        # Parameters that are frozen as such are frozen by the optimizer, whatever their gradients are.
        same_gradients(model, reference, besides=handle.frozen if case.freeze == "params" else ())
        assert handle.phase not in handle._run.gated_phases or handle.state_dict()["forwards"] == [[0, 5]]
        model.zero_grad()
        reference.zero_grad()
        handle.advance()
    assert dropped
    assert handle._run.watch.traced == set(range(len(handle.branches))) - ungated
    assert handle.check().facts[1].startswith("6 training forwards, 6 steps")


def test_parts_that_are_compiled_while_the_model_is_not():
    """Regional compilation: masks are drawn by Python and gates are in compiled code."""
    model = CASE.model()
    reference = copy.deepcopy(model)
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    assert "torch._dynamo" in sys.modules, "a compiler may be at work"

    def part(block: nn.Module, x: Tensor) -> Tensor:
        with compiling():
            return type(block).forward(block, x)

    for block in model.body:
        block.forward = functools.partial(part, block)
    for step in range(4):
        x = model.rows(5, step)
        with handle.paused():
            assert torch.equal(model(x), reference(x))
        output = model(x)
        torch.testing.assert_close(output, CASE.oracle(reference, x, handle.masks, handle.phase))
        assert not torch.equal(output, reference(x)) or handle.phase is rdp.Phase.FREEZE
        assert handle._run.compiled is None
        loss(output).backward()
        assert handle.state_dict()["forwards"] == [[0, 5]]
        model.zero_grad()
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
            if result.requires_grad:
                result.square().sum().backward()
        same_gradients(model, reference)
        model.zero_grad()
        reference.zero_grad()
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
        handle._run.compiled = compiled.Given(torch.zeros(2, 6, dtype=torch.bool))  # of a forward that was interrupted
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


@pytest.mark.parametrize("context", [compiling, contextlib.nullcontext])
def test_rows_are_those_of_the_first_tensor_that_has_any(context):
    model = ScalarFirst()
    call = {"scale": torch.tensor(2.0), "inputs": {"x": torch.randn(3, 4, requires_grad=True)}}
    handle = rdp.attach(model, 0.5, example_inputs=call)
    with context():
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


# -- operators --------------------------------------------------------------------------------------------------------


def attached(**options: Any) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    return model, CASE.attach(model, example_inputs=model.rows(2, 0), **options)


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
def test_operators_return_what_a_compiler_is_told(sampling):
    """And the masks are a copy: a later forward does not change them."""
    model, handle = attached(sampling=sampling)
    x = model.rows(7, 0)
    masks, order, keep_probs, ticket = compiled.begin_forward(x, 7, id(handle._run), 2, sampling == "fixed")
    one = compiled.reached(x, ticket)
    told = (
        *compiled.begin_forward(x.to("meta"), 7, id(handle._run), 2, sampling == "fixed"),
        compiled.reached(x.to("meta"), ticket.to("meta")),
    )
    for made, expected in zip((masks, order, keep_probs, ticket, one), told, strict=True):
        assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
    assert (masks.device.type, ticket.device.type) == ("cpu", "cpu")
    assert torch.equal(masks, handle.masks)
    assert masks.data_ptr() != handle._run.masks.data_ptr()
    assert one.item() == 1
    if sampling == "fixed":
        assert torch.equal(masks.gather(1, order), masks.sort(1, descending=True).values)
        assert order.sort(1).values.tolist() == [[*range(7)]] * 2


def test_a_forward_may_learn_for_as_long_as_its_ticket_lives():
    model, handle = attached()
    masks, _, keep_probs, ticket = compiled.begin_forward(model.rows(7, 0), 7, id(handle._run), 2, False)
    (forward,) = handle._run.step.forwards
    assert forward.may_learn
    del ticket
    assert not forward.may_learn
    assert masks.shape == (2, 7)
    assert keep_probs.tolist() == [1 - branch.rate for branch in handle.branches]


def marked(run: Run, rows: int) -> tuple[Tensor, Tensor]:
    """An input of a forward of a compiled model, and the same so that its backward tells that it has come."""
    x = torch.ones(rows, requires_grad=True)
    run.compiled = compiled.Given(*compiled.begin_forward(x, rows, id(run), 2, False))
    output = compiled.marked(run, run.ends[0], x)
    assert output is not x
    run.compiled = None
    return x, output


def test_a_backward_tells_that_it_came_to_its_forward_and_changes_no_gradient():
    _, handle = attached()
    run = handle._run
    made = [marked(run, rows) for rows in (3, 4, 5)]
    told: list[int] = []
    run.step.reached = lambda forward: told.append(forward.rows)
    for number in (1, 2):
        x, output = made[number]
        (gradient,) = torch.autograd.grad((output * 3).sum(), x)
        assert gradient.tolist() == [3.0] * x.numel()
    assert told == [4, 5]


def test_the_first_and_the_last_branch_are_marked_where_they_have_a_gradient():
    _, handle = attached()
    run = handle._run
    run.compiled = compiled.Given(*compiled.begin_forward(torch.ones(3), 3, id(run), 2, False))
    constant, x = torch.ones(3), torch.ones(3, requires_grad=True)
    for branch in range(len(handle.branches)):
        assert compiled.marked(run, branch, constant) is constant
        assert (compiled.marked(run, branch, x) is not x) == (branch in (0, len(handle.branches) - 1))
    run.compiled = None
    assert compiled.marked(run, 0, x) is x


def test_a_backward_after_its_step_or_its_run_is_over_tells_nobody():
    model, handle = attached()
    _, output = marked(handle._run, 3)
    handle.advance()
    output.sum().backward(retain_graph=True)
    assert handle.state_dict()["forwards"] == []
    del model, handle
    gc.collect()
    output.sum().backward()


def test_compiled_code_is_forgotten_where_there_may_be_some(monkeypatch):
    """Where `torch._dynamo` was never imported there is none, and it is not imported for that."""
    asked: list[str] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: asked.append("reset"))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch._dynamo")
        compiled.forget_compiled()
        assert asked == []
    compiled.forget_compiled()
    assert asked == ["reset"]
