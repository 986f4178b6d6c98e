"""A run: what forwards ask of other ranks, what the end of one adds to the graph, and what the end of a step tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from laws.masks import draw
from laws.strategies import Case
from laws.training import loss
from torch import Tensor, nn
from torch.optim import SGD

import rdp
from rdp import Phase, masks
from rdp.distributed.ranks import Ranks
from rdp.training import drawing, run_hook
from rdp.training import run as module
from rdp.training.run import Run

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def attached(**changes: Any) -> tuple[nn.Module, rdp.ResidualDropPath, Run]:
    model = CASE.model()
    handle = CASE.attach(model, **{"example_inputs": model.rows(2, 0)} | changes)
    return model, handle, handle._run


def learn(model: nn.Module, seed: int = 0, rows: int = 4) -> None:
    loss(model(model.rows(rows, seed))).backward()


# -- several ranks ----------------------------------------------------------------------------------------------------


class Question:
    def __init__(self, live: Tensor) -> None:
        self.live = live

    def answer(self) -> Tensor:
        return self.live


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """This is rank 2 of 4; what the ranks are asked is written down, and answered as `answer` says, or as asked."""
    made = SimpleNamespace(asked=[], answer=None)

    def ask(self: Ranks, live: Tensor, facts: object) -> Question:
        made.asked.append(live.tolist())
        return Question(live if made.answer is None else torch.tensor(made.answer))

    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(Ranks, "rank", 2)
    monkeypatch.setattr(Ranks, "size", 4)
    monkeypatch.setattr(Ranks, "ask", ask)
    return made


def test_each_rank_draws_masks_of_its_own(ranks):
    model, handle, _ = attached()
    learn(model, rows=6)
    assert handle.masks.tolist() == draw([0.6] * 3, 6, seed=2, cycle=0, micro_batch=0, rank=2)
    state = handle.state_dict()
    other = attached(example_inputs=None)[1]
    other.load_state_dict(state)
    other.discover(model.rows(2, 0))
    assert torch.equal(other.masks, handle.masks)


def test_ranks_agree_before_a_step_on_what_is_frozen_in_it(ranks):
    model, handle, run = attached(mode="batch")
    learn(model)
    mine = run.live().tolist()
    assert ranks.asked == []
    ranks.answer = [True, False, True]
    frozen = run.settle()
    assert ranks.asked == [mine]
    names = {name for name, p in model.named_parameters() if id(p) in frozen}
    assert names == set(handle.branches[1].parameters) == set(handle.frozen)
    run.advance(frozen)
    assert set(handle.frozen) == set(), "the next step begins anew"


def test_after_its_removal_a_handle_asks_nobody(ranks):
    model, handle, run = attached()
    learn(model)
    handle.remove()
    run.settle()
    assert ranks.asked == []


def test_masks_are_drawn_once_a_cycle_but_for_rows_that_drop_did_not_have(monkeypatch):
    model, handle, run = attached()
    drawn: list[int] = []

    def draw_and_count(rates: Any, rows: int, **where: Any) -> Tensor:
        drawn.append(rows)
        return masks.draw(rates, rows, **where)

    monkeypatch.setattr(drawing, "masks", SimpleNamespace(draw=draw_and_count))
    for rows in (4, 3, 5):
        learn(model, rows=4)
        handle.advance()
        model.zero_grad()
        model.body[0].eval()  # plain in this forward alone
        learn(model, rows=rows)
        model.body.train()
        expected = torch.tensor(draw([0.6] * 3, rows, seed=2, cycle=run.step.cycle, micro_batch=0))
        assert torch.equal(handle.masks[1:], expected[1:])
        assert handle.masks[0].all()
        learn(model, rows=3)  # a second forward begins again at the first
        expected = torch.tensor(draw([0.6] * 3, 3, seed=2, cycle=run.step.cycle, micro_batch=0))
        assert torch.equal(handle.masks, expected)
        handle.advance()
        model.zero_grad()
    assert drawn == [4, 4, 4, 5]


def test_under_join_ranks_are_asked_of_each_forward_and_the_answers_of_those_that_count_are_joined(ranks):
    model, _, run = attached(mode="batch", seed=5)
    run.agreement.join_config = SimpleNamespace(enable=True, is_first_joinable=False)
    live = []
    for seed in range(2):
        learn(model, seed)
        live.append(run.step.forwards[-1].live.tolist())
    model(model.rows(4, 0))  # which is only run
    assert ranks.asked[:2] == live
    assert len(ranks.asked) == 3
    run.settle()
    assert len(ranks.asked) == 3, "there is nothing left to ask"
    assert run.step.agreed.tolist() == [any(pair) for pair in zip(*live, strict=True)]


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    ("mode", "several", "may"),
    [("batch", False, True), ("batch", True, True), ("row", False, True), ("row", True, False)],
)
def test_no_graph_is_needed_where_all_ranks_leave_it_out(mode, several, may, checkpoint, monkeypatch):
    monkeypatch.setattr(run_hook, "in_reentrant_checkpoint", lambda: checkpoint)
    run = attached(mode=mode)[2]
    run.several = several
    assert run_hook.may_leave_no_graph(run) == (may and not checkpoint)


def test_a_rank_that_was_out_of_data_catches_up_and_never_falls_back():
    model, handle, run = attached()
    hook = handle.join_hook()
    assert hook._agreement is run.agreement
    learn(model)
    for step, expected in ((0, 0), (3, 3), (2, 3)):
        hook._skip_to(step)
        assert (handle.step_count, hook._step_count()) == (expected, expected)
    assert handle.phase is Phase.FREEZE
    assert handle.state_dict()["forwards"] == []
    assert handle.join_device == torch.device("cpu")


# -- the end of a forward ---------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """A residual block whose model returns what `form` makes of it."""

    unsharded = 0

    def __init__(self, form) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> object:
        return self.form(x + self.fc(x))


FORMS = {
    "a tensor": (lambda y: y, lambda o: o),
    "in a tuple": (lambda y: (torch.arange(3), y, "text"), lambda o: o[1]),
    "in a dict": (lambda y: {"ids": torch.arange(3), "y": [y, y + 1]}, lambda o: o["y"][0]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_every_parameter_is_in_the_graph_where_other_ranks_wait_for_it(form, several, keep, request):
    """And alone where else there would be no graph at all; what is returned keeps its form and its numbers."""
    torch.manual_seed(0)
    make, leaf = FORMS[form]
    model, x = Outputs(make), torch.randn(3, 4)
    plain = model(x)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=x)
    while True:
        model(x)
        if handle.masks.all() == keep:
            break
        handle.advance()
        handle.advance()
    if several:
        request.getfixturevalue("ranks")
    handle.advance()  # to FREEZE: of a kept branch nothing learns, so that the output has no graph of its own
    output = leaf(model(x))
    assert torch.equal(output, leaf(plain))
    output.sum().backward()
    if keep:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_is_added_where_there_is_a_graph_and_nobody_waits(request):
    """One output is enough where somebody does."""
    model, x = Outputs(lambda y: (y + 1, y * 2)), torch.randn(3, 4)
    handle = rdp.attach(model, 1e-12, decay="constant", example_inputs=x)

    def kinds() -> list[str]:
        return [type(output.grad_fn).__name__ for output in model(x)]

    assert kinds() == ["AddBackward0", "MulBackward0"]
    request.getfixturevalue("ranks")
    first, second = kinds()
    assert first != "AddBackward0"
    assert second == "MulBackward0"
    with handle.paused():
        assert kinds() == ["AddBackward0", "MulBackward0"]


@pytest.mark.parametrize("form", [lambda y: y.argmax(1), lambda y: y.tolist()])
def test_nothing_is_added_to_what_can_have_no_graph(form):
    model, x = Outputs(form), torch.randn(3, 4)
    expected = model(x)
    rdp.attach(model, 1e-12, mode="batch", decay="constant", example_inputs=x)
    output = model(x)
    assert type(output) is type(expected)
    assert not isinstance(output, Tensor) or not output.requires_grad


def test_a_parameter_that_is_not_trained_is_not_linked():
    model, x = Outputs(lambda y: y), torch.randn(3, 4)
    model.fc.bias.requires_grad_(False)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=x)
    for _ in range(6):
        model(x).sum().backward()
        handle.advance()
    assert model.fc.bias.grad is None


class Sharded(Outputs):
    """Stands for an FSDP module, which is sharded again after each forward of its own."""

    def unshard(self) -> None:
        self.unsharded += 1


def test_what_discovery_has_sharded_again_is_unsharded_once():
    model, x = Sharded(lambda y: y), torch.randn(3, 4)
    rdp.attach(model, 0.5)
    for _ in range(2):
        model(x)
        assert model.unsharded == 1


# -- the end of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
def test_the_watch_is_told_what_was_frozen(announced, monkeypatch):
    model, handle, run = attached(mode="batch")
    told: list[frozenset[int]] = []
    tell = run.watch.step_ends
    monkeypatch.setattr(run.watch, "step_ends", lambda frozen: (told.append(frozen), tell(frozen)))
    optimizer = handle.wrap(SGD(model.parameters(), lr=0.1))
    for step in range(4):
        learn(model, step)
        expected = set(handle.frozen)
        handle.advance() if announced else optimizer.step()
        names = {name for name, p in model.named_parameters() if id(p) in told[-1]}
        assert names == expected
        model.zero_grad()
    assert len(told) == 4
    assert any(told)


def test_a_wrapped_optimizer_has_its_parameters_probed(monkeypatch):
    """When it is wrapped they are those of the model; FSDP may put others into the modules later."""
    model, handle, run = attached()
    held = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(model, "named_parameters", lambda *_, **__: iter(held.items()))
        patch.setattr(model, "parameters", lambda: iter(held.values()))
        optimizer = handle.wrap(SGD(held.values(), lr=0.1))
    assert run.optimizers == [optimizer]
    assert {name: id(p) for name, p in run.held.items()} == {name: id(p) for name, p in held.items()}
    for p in held.values():
        p.grad = torch.zeros_like(p)
    assert all(gradient is not None for gradient in run.probes.gradients())
