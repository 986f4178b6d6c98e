"""Faults that the library would make itself, planted one by one: each is told by the first cycle's one warning."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP, ConvNet, LoopMLP, Transformer
from laws.strategies import Case
from laws.training import loss
from torch import nn

import rdp
from rdp.training import compiled, first_cycle

CASES = [
    pytest.param(Case(BlockMLP, (("plain",) * 3,), mode="batch", rate=0.8, seed=3), id="mlp"),
    pytest.param(Case(ConvNet, ("basic", (1, 1, 1)), mode="batch", rate=0.8, seed=3), id="conv"),
    pytest.param(Case(Transformer, ("pre_norm", 3), mode="batch", rate=0.8, seed=1), id="transformer"),
]


def train(model: nn.Module, call: Any, handle: rdp.ResidualDropPath, steps: int = 4) -> list[str]:
    """What is told in these steps."""
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            loss(call(model.rows(6, step))).backward()
            optimizer.step()
    return [str(warning.message) for warning in caught if warning.category is rdp.RdpWarning]


@pytest.fixture
def _no_guards(monkeypatch):
    """Compiled code does not look at hooks, as torch would have it."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "attached", lambda run: compiled._runs.update({id(run): run}))
    gc.collect()  # runs of other tests that nobody has removed
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_guards")
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_an_ungated_block_that_serves_for_gated_ones(case):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    for block in model.body:
        block.compile(backend="eager")
    (text,) = train(model, model, handle)
    assert "was never reached by a training forward" in text


@pytest.mark.usefixtures("_no_guards")
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_a_plain_twin_that_serves_for_the_attached_model(case):
    model = case.model()
    twin = copy.deepcopy(model)
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    torch.compile(twin, backend="eager")(model.rows(6, 0))
    (text,) = train(model, torch.compile(model, backend="eager"), handle)
    assert "was never reached by a training forward" in text


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_parameter_that_is_frozen_with_a_branch_although_it_learns_without_it(case, late, monkeypatch):
    """As by wrong nesting or ownership; a branch may be frozen for the first time when the first cycle is over."""
    model = case.model()
    stem = next(name for name, _ in model.named_parameters())
    handle = case.attach(model, verify=False)  # which would have told before
    handle._run.first.over = late
    found = handle._run.found

    def wrong(branches: tuple[rdp.Branch, ...]) -> None:
        last = branches[-1]
        found((*branches[:-1], dataclasses.replace(last, parameters=(*last.parameters, stem))))

    monkeypatch.setattr(handle._run, "found", wrong)
    (text,) = train(model, model, handle)
    assert f"`{stem}` is frozen, but the output still depends on it" in text


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_that_moves_what_is_frozen(case, monkeypatch):
    @torch.no_grad()
    def shrink(*_: object) -> None:
        for p in model.parameters():
            p.mul_(0.999)

    monkeypatch.setattr(rdp.MaskedOptimizer, "_hide", lambda self: self._run.settle())
    model = case.model()
    handle = case.attach(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    inner.register_step_post_hook(shrink)
    monkeypatch.setattr(torch.optim, "SGD", lambda *_, **__: inner)
    (text,) = train(model, model, handle)
    assert "moved although frozen" in text


def test_it_is_looked_at_one_whole_cycle_and_a_step():
    told: list[int] = []
    model = LoopMLP(2)
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(2, 0))
    run = handle._run
    run.first.examine = lambda: bool(told.append(run.step.number))
    handle.advance()
    assert told == []
    handle._run.go_to(3, {})  # as a state that is loaded
    for _ in range(4):
        handle.advance()
    assert told == [4, 5]
    assert run.first.over
    model(model.rows(2, 0))
    assert run.first._calls == []


def test_the_form_of_inputs_is_what_can_be_told_without_their_numbers():
    x = torch.ones(2, 3)
    same = [((x,), {"a": None, "n": 1}), ((torch.zeros(4, 5),), {"a": None, "n": 2})]
    other = [((x,), {"a": x, "n": 1}), ((x[0],), {"a": None, "n": 1}), ((x,), {"a": None, "n": True}), ((x,), {})]
    assert first_cycle._form(same[0]) == first_cycle._form(same[1])
    assert len({first_cycle._form(inputs) for inputs in [same[0], *other]}) == 5
