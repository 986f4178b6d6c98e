"""What users are told, word by word: warnings of a step, refusals of the handle, and the handle itself when printed."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import loss
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import rdp

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def attached(**changes: Any) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    return model, CASE.attach(model, **{"example_inputs": model.rows(2, 0)} | changes)


def learn(model: nn.Module, seed: int = 0) -> None:
    loss(model(model.rows(4, seed))).backward()


@contextlib.contextmanager
def told(*messages: str) -> Iterator[None]:
    """Just these warnings, and no others; each shows a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    expected = [(message, rdp.RdpWarning, __file__) for message in messages]
    assert [(str(w.message), w.category, w.filename) for w in caught] == expected


@contextlib.contextmanager
def refused(kind: type[rdp.RdpError], message: str) -> Iterator[None]:
    with pytest.raises(kind) as error:
        yield
    assert str(error.value) == message


# -- warnings ---------------------------------------------------------------------------------------------------------

IDLE = (
    "the optimizer stepped, but no gated training forward of the attached model came before it: Residual DropPath had "
    "no part in this step. Is the model in eval mode, or was only a part of it called?"
)


def test_a_step_without_a_forward_is_told_once():
    model, handle = attached()
    optimizer = handle.wrap(SGD(model.parameters(), lr=0.1))
    with told(IDLE):
        optimizer.step()
        optimizer.step()
    assert handle.step_count == 2
    handle.remove()
    with told():
        optimizer.step()


def test_a_step_after_nothing_but_a_forward_that_raised_is_one_without_a_forward():
    model, handle = attached()
    optimizer = handle.wrap(SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.zeros(2, 7, dtype=torch.float64))
    with told(IDLE):
        optimizer.step()


def test_an_optimizer_whose_place_was_taken():
    model, handle = attached()
    old, new = (handle.wrap(kind(model.parameters(), lr=0.1)) for kind in (SGD, Adam))
    learn(model)
    with told():
        new.step()
    learn(model)
    with told(
        "this SGD stepped, although the handle has wrapped another optimizer over some of the same parameters since, "
        "which took its place. Give each parameter to one optimizer; where several alternate, step plain ones and call "
        "handle.advance() after each step"
    ):
        old.step()


def test_a_branch_that_is_called_without_its_model_is_told_once_and_only_where_it_would_learn():
    model, handle = attached()
    first, second = (model.body[i].fc2 for i in range(2))
    x = torch.randn(3, first.in_features, dtype=CASE.dtype)
    with told():
        learn(model)
        with torch.no_grad():
            second(x)
        with handle.paused():
            second(x)
        model.eval()
        second(x)
        model.train()
    with told(
        "branch `body.1.fc2` ran outside of a forward of the attached model, so it is trained plainly. Call the "
        "BlockMLP itself, not its parts, or attach to the part that is called"
    ):
        for module in (second, first, second):
            module(x)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Accelerated(SGD):
    """Known by this attribute."""

    step_was_skipped = False


def test_an_optimizer_that_cannot_be_wrapped():
    model, handle = attached()
    for optimizer, message in [
        (3, "wrap needs a torch.optim.Optimizer; got int"),
        (
            handle.wrap(SGD(model.parameters(), lr=0.1)),
            "this optimizer is wrapped already; wrap the plain one, once",
        ),
        (
            Accelerated(model.parameters(), lr=0.1),
            "this Accelerated has been through accelerator.prepare; wrap first and prepare the result: "
            "accelerator.prepare(handle.wrap(optimizer))",
        ),
        (
            SGD(nn.Linear(2, 2).parameters(), lr=0.1),
            "this SGD holds no parameter of the attached BlockMLP; build it from model.parameters() of the very model "
            "that was attached",
        ),
    ]:
        with refused(rdp.ArgumentError, message):
            handle.wrap(optimizer)
    with told():  # none of them has taken the place of the one that is wrapped
        assert handle.check().facts[2].startswith("1 wrapped optimizers")


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [("text", "x: 'text'"), (torch.tensor(1.0), "x: a tensor of shape []"), ({}, "nothing"), ((), "nothing")],
)
def test_inputs_without_rows(inputs, shown):
    with refused(
        rdp.ArgumentError,
        "example_inputs (of which a tuple is taken for positional and a dict for keyword arguments): the model was "
        "called without any tensor that has a batch axis, so there are no rows to mask (it was called with "
        f"{shown}); use mode='batch', which needs no rows, or attach to a part that is called with rows, as "
        "model.backbone",
    ):
        CASE.attach(CASE.model()).discover(inputs)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_inputs_that_the_model_does_not_take(mode):
    arguments, message = {"y": torch.zeros(2, 3)}, "BlockMLP.forward() got an unexpected keyword argument 'y'"
    with refused(
        rdp.ArgumentError,
        "example_inputs (of which a tuple is taken for positional and a dict for keyword arguments): BlockMLP, called "
        f"with (y: a tensor of shape [2, 3]), raises TypeError: {message}",
    ):
        CASE.attach(CASE.model(), mode=mode).discover(arguments)


def test_an_empty_example():
    with refused(
        rdp.ArgumentError,
        "example_inputs (of which a tuple is taken for positional and a dict for keyword arguments): the batch is "
        "empty (0 rows); skip it, or train it under handle.paused()",
    ):
        inputs = torch.zeros(0, 3)
        CASE.attach(CASE.model()).discover(inputs)


def test_inputs_that_were_made_in_inference_mode():
    model = CASE.model()
    with torch.inference_mode():
        x = model.rows(2, 0).clone()
    with refused(
        rdp.ArgumentError,
        "example_inputs holds a tensor that was made under torch.inference_mode, which cannot be followed through the "
        "model; pass a clone() of it that is made outside",
    ):
        CASE.attach(model).discover(x)


@pytest.mark.parametrize("method", ["wrap", "discover"])
def test_a_removed_handle_is_of_no_use(method):
    model, handle = attached()
    given = {"wrap": SGD(model.parameters(), lr=0.1), "discover": model.rows(2, 0)}[method]
    handle.remove()
    with refused(rdp.AttachError, "this handle was removed from its BlockMLP; attach again with rdp.attach(model)"):
        getattr(handle, method)(given)


def by_replica(model: nn.Module) -> None:
    copy.copy(model)(model.rows(2, 0))


def by_reentrant_checkpoint(model: nn.Module) -> None:
    loss(checkpoint(model, model.rows(2, 0).requires_grad_(), use_reentrant=True)).backward()


def by_vmap(model: nn.Module) -> None:
    torch.func.vmap(model)(model.rows(6, 0).reshape(3, 2, 3))


FORWARDS: list[tuple[Callable[[nn.Module], object], str]] = [
    (
        by_replica,
        "this BlockMLP is a replica or a shallow copy of the attached model, as torch.nn.DataParallel makes them. Use "
        "DistributedDataParallel, or attach to the copy itself",
    ),
    (
        by_reentrant_checkpoint,
        "the whole model is recomputed by a checkpoint with use_reentrant=True, whose first forward runs without "
        "gradients and was taken for a plain one. Pass use_reentrant=False, or checkpoint its blocks",
    ),
    (
        by_vmap,
        "the model was called under torch.func (vmap, grad, jvp), where rows cannot be told apart",
    ),
    (
        lambda model: model(model.rows(2, 0)[:0]),
        "the batch is empty (0 rows); skip it, or train it under handle.paused()",
    ),
    (
        lambda model: model(torch.tensor(1.0)),
        "the model was called without any tensor that has a batch axis, so there are no rows to mask",
    ),
]


@pytest.mark.parametrize(("call", "message"), FORWARDS, ids=["replica", "checkpoint", "vmap", "empty", "scalar"])
def test_a_forward_that_cannot_be_gated_leaves_the_next_as_it_would_have_been(call, message):
    model, handle = attached()
    twin, expected = attached()
    with refused(rdp.ForwardError, message):
        call(model)
    x = model.rows(4, 0)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(handle.masks, expected.masks)
    with told():
        model.zero_grad()
        learn(model)


class Distributed(nn.Linear):
    """Stands for a layer that returns a DTensor, which has a `_local_tensor`."""

    local = False

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.local:
            out._local_tensor = out
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Distributed(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_an_output_without_rows_of_its_own(mode):
    model, x = Block(), torch.randn(3, 4)
    rdp.attach(model, 0.5, mode=mode, decay="constant", example_inputs=x)
    model.fc.local = True
    if mode == "batch":
        model(x)
        return
    with refused(
        rdp.ForwardError,
        "the output of `fc` is a DTensor, whose rows cannot be masked. Attach after parallelize_module and let the "
        "module return a local tensor (use_local_output=True), or use mode='batch'",
    ):
        model(x)


# -- the handle itself ------------------------------------------------------------------------------------------------


def test_how_a_handle_is_printed():
    model, handle = attached(example_inputs=None, verify=True)
    head = "ResidualDropPath(BlockMLP, rate=0.6, mode='row'): "
    assert repr(handle) == f"{head}step 0, phase DROP; branches will be found in the first training forward"
    learn(model)
    handle.advance()
    table = [re.sub(" +", " ", line) for line in repr(handle).splitlines()]
    assert table == [
        f"{head}step 1, phase FREEZE",
        "branch rate kind compute parameters note",
        *(f"body.{i}.fc2 0.600 identity rows {4 + 2 * (i == 1)}" for i in range(3)),
        "proved on two rows of the input",
    ]
    handle.remove()
    assert repr(handle).startswith(f"{head}removed\nbranch ")
