"""After the first cycle of phases one warning names what is wrong, and sound training of any kind has none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP, ConvNet, LoopMLP, Transformer
from laws.strategies import Case
from laws.training import loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rdp
from rdp import Phase

CASES = [
    pytest.param(Case(LoopMLP, (3,), decay="constant", mode="batch", seed=2), id="loop-batch"),
    pytest.param(Case(BlockMLP, (("plain", "norm"),), seed=3), id="mlp-row"),
    pytest.param(Case(ConvNet, ("basic", (1, 2)), decay="constant", seed=3), id="conv-row"),
    pytest.param(Case(ConvNet, ("bottleneck", (1, 1)), mode="batch", freeze="params", seed=3), id="conv-params"),
    pytest.param(Case(Transformer, ("pre_norm", 2), decay="constant", mode="batch", seed=1), id="transformer-batch"),
    pytest.param(Case(Transformer, ("parallel", 2), sampling="fixed", decay="constant"), id="transformer-fixed"),
]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings of the library."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(warning.message) for warning in caught if issubclass(warning.category, rdp.RdpWarning)]


# -- sound training ---------------------------------------------------------------------------------------------------


def every_batch(case: Case, optimizer: Callable[[Any], torch.optim.Optimizer] = sgd, **changes: Any) -> Any:
    model = case.model()
    handle = case.attach(model, **changes)
    inner = handle.wrap(optimizer(model.parameters()))
    for step in range(6):
        inner.zero_grad()
        loss(model(model.rows(6, step))).backward()
        inner.step()
    return handle


def found_beforehand(case: Case) -> Any:
    return every_batch(case, example_inputs=case.model().rows(2, 0))


def adamw(case: Case) -> Any:
    return every_batch(case, torch.optim.AdamW)


def drop_path_alone(case: Case) -> Any:
    return every_batch(case, phases=(Phase.DROP,))


def with_plain_steps(case: Case) -> Any:
    return every_batch(case, phases=(Phase.PLAIN, Phase.DROP, Phase.FREEZE))


def rate_0(case: Case) -> Any:
    return every_batch(case, rate=0.0)


def low_rate(case: Case) -> Any:
    """So low that nothing is dropped in a few steps."""
    return every_batch(case, rate=0.001) if case.sampling == "bernoulli" else every_batch(case)


def accumulated_with_a_short_end(case: Case) -> Any:
    """Epochs of seven batches, three to a step."""
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(sgd(model.parameters()))
    for number in range(21):
        loss(model(model.rows(6, number))).backward()
        if number % 7 in (2, 5, 6):
            optimizer.step()
            optimizer.zero_grad()
        if number % 7 == 6:
            model.eval()
            with torch.no_grad():
                model(model.rows(3, 0))
            model.train()
    return handle


def several_optimizers(case: Case) -> Any:
    model = case.model()
    handle = case.attach(model)
    parameters = list(model.parameters())
    optimizers = [handle.wrap(sgd(some)) for some in (parameters[::2], parameters[1::2])]
    for step in range(6):
        loss(model(model.rows(6, step))).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return handle


def lbfgs(case: Case) -> Any:
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(model.rows(6, 0)))
        value.backward()
        return value

    for _ in range(6):
        optimizer.step(closure)
    return handle


def announced_by_hand(case: Case) -> Any:
    """Plain gradient descent, which moves nothing that is frozen, in a loop of its own."""
    model = case.model()
    handle = case.attach(model)
    for step in range(6):
        loss(model(model.rows(6, step))).backward()
        frozen = {*handle.frozen}  # which has gradients with freeze="params"
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None and name not in frozen:
                    p -= 0.01 * p.grad
                p.grad = None
        handle.advance()
    return handle


def resumed(case: Case) -> Any:
    state, model = every_batch(case).state_dict(), case.model()
    handle = case.attach(model)
    handle.load_state_dict(state)
    handle.advance()
    optimizer = handle.wrap(sgd(model.parameters()))
    for step in range(5):
        optimizer.zero_grad()
        loss(model(model.rows(6, step))).backward()
        optimizer.step()
    return handle


LOOPS = [
    every_batch,
    found_beforehand,
    adamw,
    drop_path_alone,
    with_plain_steps,
    rate_0,
    low_rate,
    accumulated_with_a_short_end,
    several_optimizers,
    lbfgs,
    announced_by_hand,
    resumed,
]


@pytest.mark.parametrize("train", LOOPS, ids=lambda train: train.__name__)
@pytest.mark.parametrize("case", CASES)
def test_sound_training_has_no_warning_and_no_problem(case, train):
    with told() as texts:
        handle = train(case)
    assert texts == []
    assert handle.check().problems == ()
    assert str(handle.check()).startswith("sound\n")


class Parts(nn.Module):
    """A branch that is called where the inputs ask for it, and one that a checkpoint runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.asked, self.deep = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, more: Tensor | None = None, *, ask: bool = True) -> Tensor:
        x = self.stem(x)
        if ask and more is not None:
            x = x + self.asked(x)
        return x + checkpoint(self.deep, x, use_reentrant=False)


@pytest.mark.parametrize("how", [{"ask": False}, {"more": None}])
def test_a_path_that_the_form_of_the_inputs_chooses_is_not_one_that_is_skipped(how):
    model, x = Parts(), torch.randn(6, 4)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant", example_inputs=(x, x))
    optimizer = handle.wrap(sgd(model.parameters()))
    with told() as texts:
        for step in range(6):
            for given in ({}, how) if step != 3 else ({},):
                model(x, **({"more": x} | given)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert texts == []
    assert handle.check().ok


def test_what_is_not_trained_needs_no_optimizer():
    """Fine-tuning a head: the optimizer holds it alone."""
    model = LoopMLP(3)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant")
    optimizer = handle.wrap(sgd(model.head.parameters()))
    with told() as texts:
        for step in range(6):
            model(model.rows(4, step)).square().sum().backward()
            optimizer.step()
            model.zero_grad()
    assert texts == []


# -- what is wrong ----------------------------------------------------------------------------------------------------


def cycles(case: Case, handle: Any, optimizer: Any, model: nn.Module, steps: int = 6) -> str:
    """Train; the only warning."""
    with told() as texts:
        for step in range(steps):
            optimizer.zero_grad()
            loss(model(model.rows(6, step))).backward()
            optimizer.step()
    (text,) = texts
    assert not handle.check().ok
    return text


@torch.no_grad()
def shrink(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(0.999)


FOUR = [case for case in CASES if case.id in ("loop-batch", "mlp-row", "conv-row", "transformer-batch")]


@pytest.mark.parametrize("case", FOUR)
def test_a_model_that_skips_branches_by_itself(case):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    branch = next(b for b in handle.branches if b.rate > 0)
    parts = model.layers if isinstance(model, LoopMLP) else model.body
    index = int(branch.name.split(".")[1])
    skipping, whole, calls = parts[index], parts[index].forward, []

    class Skips(nn.Module):
        """Skips the whole block, every other time."""

        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) % 2:
                return whole(x)
            return torch.zeros_like(x) if isinstance(model, LoopMLP) else x

    if isinstance(model, LoopMLP):
        plain_call = model.forward

        def forward(x: Tensor) -> Tensor:
            calls.append(x)
            kept = model.layers
            model.layers = nn.ModuleList(f for f in kept if len(calls) % 2 or f is not skipping)
            try:
                return plain_call(x)
            finally:
                model.layers = kept

        model.forward = forward
    else:
        skipping.forward = Skips().forward
    optimizer = handle.wrap(sgd(model.parameters()))
    text = cycles(case, handle, optimizer, model)
    assert f"`{branch.name}`" in text
    assert "was not called in 1 of 2 forwards: does the model skip it by itself" in text


@pytest.mark.parametrize("case", FOUR)
def test_a_branch_whose_hook_was_lost(case):
    """As by whatever puts other modules in the places of those that have the hooks."""
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0), compute="dense")
    branch = next(b for b in handle.branches if b.rate > 0)
    model.get_submodule(branch.gates[0].module)._forward_hooks.clear()
    text = cycles(case, handle, handle.wrap(sgd(model.parameters())), model)
    assert f"`{branch.name}` lost the hook" in text


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].mode == "batch"])
def test_frozen_parameters_that_something_else_moves(case):
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(sgd(model.parameters()))
    step = optimizer.step
    optimizer.step = lambda: (step(), shrink(model))  # what the optimizer itself does would be undone
    text = cycles(case, handle, optimizer, model)
    assert "moved although frozen in that step" in text


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("loop-batch", "transformer-batch")])
def test_parameters_that_no_wrapped_optimizer_holds(case):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    name = handle.branches[-1].parameters[0]
    ours = [p for other, p in model.named_parameters() if other != name]
    wrapped, plain = handle.wrap(sgd(ours)), sgd([model.get_parameter(name)])
    with told() as texts:
        for step in range(6):
            wrapped.zero_grad()
            plain.zero_grad()
            loss(model(model.rows(6, step))).backward()
            plain.step()
            wrapped.step()
    (text,) = texts
    assert f"`{name}` is in no wrapped optimizer" in text


def test_phases_that_gate_nothing_are_known_to_the_report_alone():
    model = LoopMLP(3)
    handle = rdp.attach(model, 0.5, phases=(Phase.PLAIN,))
    optimizer = handle.wrap(sgd(model.parameters()))
    with told() as texts:
        for step in range(3):
            loss(model(model.rows(4, step))).backward()
            optimizer.step()
    assert texts == []
    assert handle.check().problems == ("phases= holds neither DROP nor FREEZE, so nothing is gated",)


@pytest.mark.parametrize("case", FOUR)
def test_a_training_in_eval_mode(case):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    optimizer = handle.wrap(sgd(model.parameters()))
    model.eval()
    assert "no gated training forward" in cycles(case, handle, optimizer, model)
    (problem,) = handle.check().problems[:1]
    assert problem == (
        "6 of 6 steps had no training forward of the attached model; it was called in eval mode only: "
        "call model.train()"
    )
    handle.remove()
    handle = case.attach(model.train(), example_inputs=model.rows(2, 0))
    model.eval()
    with told() as texts:
        for step in range(4):
            model(model.rows(6, step))
            handle.advance()
    (text,) = texts
    assert "2 of 2 steps had no training forward" in text


def test_drop_and_freeze_of_other_numbers_of_forwards():
    model = LoopMLP(3)
    handle = rdp.attach(model, 0.5, decay="constant")
    optimizer = handle.wrap(sgd(model.parameters()))
    for step in range(8):
        for part in range(1 + step % 2):
            loss(model(model.rows(4, part))).backward()
        optimizer.step()
        optimizer.zero_grad()
    (problem,) = handle.check().problems
    assert problem.startswith("4 of 4 FREEZE steps had another number of forwards than their DROP step")


@pytest.mark.parametrize("case", CASES)
def test_the_report_says_on_how_many_rows_each_branch_has_learnt(case):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    optimizer = handle.wrap(sgd(model.parameters()))
    learnt = {Phase.DROP: 0, Phase.FREEZE: 0}
    for step in range(4):
        optimizer.zero_grad()
        model(model.rows(6, 9))  # which does not count, since it has no backward
        loss(model(model.rows(6, step))).backward()
        learnt[handle.phase] += (handle.masks if handle.phase is Phase.DROP else ~handle.masks).sum(1)
        optimizer.step()
    lines = [line for line in handle.check().facts if line.startswith("rows")]
    assert lines == [
        f"rows that `{branch.name}` learnt on: {learnt[Phase.DROP][i]} of 12 in DROP, "
        f"{learnt[Phase.FREEZE][i]} of 12 in FREEZE"
        for i, branch in enumerate(handle.branches)
        if branch.rate > 0
    ]
