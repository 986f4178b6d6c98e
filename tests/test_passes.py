"""`rdp.passes`: when a branch may be left out of the graph, and what the end of a forward adds to it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from torch import Tensor, nn

import rdp
from rdp import passes

CASE = Case(BlockMLP, (("plain", "norm"),), rate=0.5, decay="constant", seed=3)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    ("mode", "several", "may"),
    [("batch", False, True), ("batch", True, True), ("row", False, True), ("row", True, False)],
)
def test_no_graph_is_needed_where_all_ranks_leave_it_out(mode, several, may, checkpoint, monkeypatch):
    monkeypatch.setattr(passes, "in_reentrant_checkpoint", lambda: checkpoint)
    run = SimpleNamespace(options=SimpleNamespace(mode=mode), agreement=SimpleNamespace(several=several))
    assert passes.may_leave_no_graph(run) == (may and not checkpoint)


def test_a_replica_of_the_model_is_refused():
    model = CASE.model()
    CASE.attach(model)
    with pytest.raises(rdp.ForwardError) as error:
        copy.copy(model)(model.rows(2, 0))
    assert str(error.value) == (
        "this BlockMLP is a replica or a shallow copy of the attached model, as torch.nn.DataParallel makes them. Use "
        "DistributedDataParallel, or attach to the copy itself"
    )


class Outputs(nn.Module):
    """A residual block whose model returns what `form` makes of it."""

    def __init__(self, form) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> object:
        return self.form(x + self.fc(x))


FORMS = {
    "a tensor": lambda y: y,
    "in a tuple": lambda y: (torch.arange(3), y, "text"),
    "in a dict": lambda y: {"ids": torch.arange(3), "y": [y, y + 1]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_every_parameter_is_in_the_graph_where_other_ranks_wait_for_it(form, several, keep):
    """And alone where else there would be no graph at all; what is returned keeps its form and its numbers."""
    torch.manual_seed(0)
    model, x = Outputs(FORMS[form]), torch.randn(3, 4)
    plain = model(x)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=x)
    while True:
        output = model(x)
        if handle.masks.all() == keep:
            break
        handle.advance()
        handle.advance()
    handle._run.agreement.several = several
    handle._run.agreement.forward_begins = lambda live: None
    handle.advance()  # to FREEZE: of a kept branch nothing learns, so that the output has no graph of its own
    output = model(x)
    leaf = {"a tensor": lambda o: o, "in a tuple": lambda o: o[1], "in a dict": lambda o: o["y"][0]}[form](output)
    expected = {"a tensor": lambda o: o, "in a tuple": lambda o: o[1], "in a dict": lambda o: o["y"][0]}[form](plain)
    assert torch.equal(leaf, expected)
    leaf.sum().backward()
    if keep and not several:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_is_added_where_there_is_a_graph_and_nobody_waits():
    """One output is enough where somebody does."""
    model, x = Outputs(lambda y: (y + 1, y * 2)), torch.randn(3, 4)
    handle = rdp.attach(model, 1e-12, decay="constant", example_inputs=x)

    def kinds() -> list[str]:
        return [type(output.grad_fn).__name__ for output in model(x)]

    assert kinds() == ["AddBackward0", "MulBackward0"]
    handle._run.agreement.forward_begins = lambda live: None
    handle._run.agreement.several = True
    first, second = kinds()
    assert first != "AddBackward0"
    assert second == "MulBackward0"
    with handle.paused():
        assert kinds() == ["AddBackward0", "MulBackward0"]


def test_nothing_is_added_without_gradients_or_to_outputs_that_have_none():
    model, x = Outputs(lambda y: y.argmax(1)), torch.randn(3, 4)
    rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=x)
    assert not model(x).requires_grad
    model = Outputs(lambda y: y)
    rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=x)
    with torch.no_grad():
        assert not model(x).requires_grad


def test_a_frozen_parameter_is_not_linked():
    model, x = Outputs(lambda y: y), torch.randn(3, 4)
    model.fc.bias.requires_grad_(False)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=x)
    for _ in range(6):
        model(x).sum().backward()
        handle.advance()
    assert model.fc.bias.grad is None


class Sharded(Outputs):
    """Stands for an FSDP module, which is sharded again after each forward of its own."""

    unsharded = 0

    def unshard(self) -> None:
        self.unsharded += 1


def test_what_discovery_has_sharded_again_is_unsharded():
    model, x = Sharded(lambda y: y), torch.randn(3, 4)
    rdp.attach(model, 0.5)
    for _ in range(2):
        model(x)
        assert model.unsharded == 1
