"""Forwards that raise, are interrupted, run in another thread or within themselves, or are run backwards twice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.test_checkpointing import CheckpointedMLP
from laws.test_mixed_precision import record_dtypes
from laws.training import after_forward, loss
from torch import Tensor, nn

import rdp

KINDS = ("plain", "norm", "plain")
CASE = Case(BlockMLP, (KINDS,), rate=0.5, decay="constant", seed=3)


def same_gradients(model: nn.Module, reference: nn.Module) -> None:
    """Of each parameter up to rounding; none is one of zero."""
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        a, b = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q))
        torch.testing.assert_close(a, b)


# -- forwards that do not end -----------------------------------------------------------------------------------------


@contextmanager
def broken(model: nn.Module, error: type[BaseException], where: str) -> Iterator[None]:
    """`error` is raised when the module of this name has run."""

    def stop(*_: object) -> None:
        raise error

    mend = after_forward(model.get_submodule(where), stop)
    with pytest.raises(error):
        yield
    mend()


def interrupted(model: nn.Module, error: type[BaseException], where: str, rows: int = 4) -> None:
    with broken(model, error, where):
        model(model.rows(rows, 0))


ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
INSIDE = pytest.mark.parametrize("where", ["stem", "body.1.fc1", "body.1.fc2", "head"])


@ERRORS
@INSIDE
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_forward_that_raised_does_not_count(error, where, mode):
    """Out of memory, say: the batch is tried again, and FREEZE replays what the forward that learned had dropped."""
    case = Case(BlockMLP, (KINDS,), mode=mode, rate=0.5, decay="constant", seed=3)
    model, twin = case.model(), case.model()
    handle, expected = (case.attach(m, example_inputs=m.rows(2, 0)) for m in (model, twin))
    for step in range(4):
        interrupted(model, error, where, rows=7)
        for k in range(2):
            x = model.rows(4, 2 * step + k)
            outputs = model(x), twin(x)
            assert torch.equal(*outputs)
            assert torch.equal(handle.masks, expected.masks)
            for output in outputs:
                loss(output).backward()
            if k == 0:
                interrupted(model, error, where)
        assert handle.frozen == expected.frozen
        assert handle.state_dict() == expected.state_dict()
        for each in (handle, expected):
            each.advance()
            each.model.zero_grad()


@ERRORS
def test_a_forward_that_raises_while_another_error_is_handled_does_not_count_and_one_that_does_not_counts(error):
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    try:
        raise MemoryError
    except MemoryError:
        interrupted(model, error, "head", rows=7)
        loss(model(model.rows(4, 0))).backward()
    assert handle.state_dict()["forwards"] == [[0, 4]]


@ERRORS
@INSIDE
def test_after_a_forward_that_raised_parts_of_the_model_are_plain_in_eval_mode(error, where):
    model, plain = CASE.model(), CASE.model()
    CASE.attach(model, rate=0.9, example_inputs=model.rows(2, 0))
    interrupted(model, error, where)
    model.eval()
    x = plain.stem(model.rows(4, 1))
    assert torch.equal(model.body(x), plain.body(x))


class Middle(nn.Module):
    """A branch of three modules, of which the last takes rows from outside of the branch too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.add = nn.LayerNorm(4), nn.Linear(4, 4), Add()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.add(self.fc(self.norm(x)), bias)


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.weight * (x + bias)


@pytest.mark.parametrize(("error", "train"), [(RuntimeError, True), (RuntimeError, False), (KeyboardInterrupt, False)])
@pytest.mark.filterwarnings("ignore:branch .add. ran outside")
def test_after_a_forward_that_raised_a_module_in_the_middle_of_a_branch_gets_all_its_rows(error, train):
    model, x, bias = Middle(), torch.randn(4, 4), torch.randn(4, 4)
    handle = rdp.attach(model, 0.5, example_inputs=(x, bias), seed=2)
    assert handle.branches[0].compute == "rows"
    with broken(model, error, "norm"):
        model(x, bias)
    assert 0 < handle.masks.sum() < 4
    model.train(train)
    assert torch.equal(model.add(x, bias), model.add.forward(x, bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_after_an_interrupted_forward_checkpoints_recompute_the_masks_of_theirs(reentrant):
    case = Case(CheckpointedMLP, (KINDS, reentrant), mode="row", rate=0.5, decay="constant", seed=3)
    model, reference = case.model(), case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    interrupted(model, KeyboardInterrupt, "head")
    for step in range(4):
        x = model.rows(4, step).requires_grad_()
        loss(model(x)).backward()
        loss(case.oracle(reference, x, handle.masks, handle.phase)).backward()
        same_gradients(model, reference)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()


def test_a_forward_that_is_interrupted_in_a_pause_hides_none_of_the_next():
    model, twin = CASE.model(), CASE.model()
    handle, _ = (CASE.attach(m, example_inputs=m.rows(2, 0)) for m in (model, twin))
    with broken(model, KeyboardInterrupt, "body.1"), handle.paused():
        model(model.rows(4, 0))
    x = model.rows(4, 0)
    assert torch.equal(model(x), twin(x))


# -- forwards beside and within each other ----------------------------------------------------------------------------


def test_a_plain_forward_in_another_thread_disturbs_nothing():
    """Pictures or scores that a thread makes while the training forward is in the middle of the model."""
    model, twin = CASE.model(), CASE.model()
    handle, _ = (CASE.attach(m, compute="dense", example_inputs=m.rows(2, 0)) for m in (model, twin))
    inside, go_on, main = threading.Event(), threading.Event(), threading.current_thread()
    x, outputs = model.rows(4, 0), []

    @torch.no_grad()
    def look() -> None:
        outputs.append(model(x))

    def together(*_: object) -> None:
        if threading.current_thread() is main:
            thread.start()
            assert inside.wait(60)
        else:
            inside.set()
            assert go_on.wait(60)

    thread = threading.Thread(target=look)
    hook = model.body[0].register_forward_hook(together)
    trained = model(x)
    go_on.set()
    thread.join()
    hook.remove()
    assert torch.equal(trained, twin(x))
    assert torch.equal(outputs[0], CASE.model()(x))
    loss(trained).backward()
    assert handle.state_dict()["forwards"] == [[0, 4]]


def test_a_model_that_calls_itself_is_not_taken_for_an_interrupted_one():
    class Twice(BlockMLP):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            if not again:
                return super().forward(x)
            with handle.paused():
                plain = self(x, again=False)
            return super().forward(x) + plain

    model = Twice(KINDS)
    handle = rdp.attach(model, 0.9, decay="constant", branches=["body.0.fc2"], compute="dense")
    handle.discover(model.rows(2, 0))
    x = model.rows(4, 0)
    with handle.paused():
        plain = BlockMLP.forward(model, x)
    output = model(x)
    assert not torch.allclose(output, 2 * plain), "the outer call is gated after the inner one has returned"
    loss(output).backward()
    assert handle.state_dict()["forwards"] == [[0, 4]]


# -- backwards, and dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [(BlockMLP, (KINDS,)), (CheckpointedMLP, (KINDS, False))],
    ids=["plain", "checkpointed"],
)
def test_two_losses_of_one_forward_and_a_backward_that_is_run_twice_have_the_forwards_masks(
    mode, architecture, arguments
):
    """One after the other with `retain_graph=True`, the second after a further forward; one micro-batch each."""
    case = Case(architecture, arguments, mode=mode, decay="constant", seed=3)
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model)
    for step in range(6):
        x = model.rows(4, step).requires_grad_()
        output = model(x)
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        loss(output).backward(retain_graph=True)
        output.square().sum().backward(retain_graph=True)
        other = model(x)
        loss(case.oracle(reference, x, handle.masks, handle.phase)).backward()
        output.square().sum().backward()
        loss(other).backward()
        (loss(expected) + 2 * expected.square().sum()).backward()
        assert handle.state_dict()["forwards"] == [[0, 4], [1, 4]]
        same_gradients(model, reference)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale_by_keep", [False, True])
def test_under_autocast_to_float16_no_module_returns_another_dtype(mode, scale_by_keep):
    case = Case(BlockMLP, (KINDS,), mode=mode, decay="constant", scale_by_keep=scale_by_keep, dtype=torch.float32)
    plain, model = case.model(), case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    seen = [record_dtypes(net) for net in (plain, model)]
    for step in range(6):
        for net in (plain, model):
            with torch.autocast("cpu", dtype=torch.float16):
                output = net(net.rows(4, step))
            assert output.dtype == torch.float16
            loss(output.float()).backward()
        handle.advance()
    assert seen[0] == seen[1]
