"""Law 8 on other ways than `loss.backward()` of what a model returned, and on steps that are tried again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from laws.architectures import BlockMLP, LoopMLP
from laws.strategies import Case
from laws.training import identical, loss, snapshot

Teach = Callable[[torch.nn.Module, Tensor], None]


def by_autograd_grad(model: torch.nn.Module, value: Tensor) -> None:
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient


def by_combined_gradients(model: torch.nn.Module, value: Tensor) -> None:
    """As PCGrad: one backward for each of several losses, and what is made of their gradients is put in place."""
    parts = []
    for factor in (0.25, 0.75):
        model.zero_grad()
        (value * factor).backward(retain_graph=True)
        parts.append([p.grad for p in model.parameters()])
    for p, *gradients in zip(model.parameters(), *parts, strict=True):
        p.grad = None if gradients[0] is None else sum(gradients)


def by_attack(model: torch.nn.Module, value: Tensor) -> None:
    """As FGSM: a forward whose gradient is taken with respect to its input comes first, and teaches nothing."""
    x = model.rows(3, 55).requires_grad_()
    torch.autograd.grad(loss(model(x)), x)
    value.backward()


def by_gradient_penalty(model: torch.nn.Module, value: Tensor) -> None:
    """As WGAN-GP: the backward of the penalty comes by the backward of a forward, and not by its end."""
    x = model.rows(4, 55).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
    (value + (gradient.square().sum() - 1).square()).backward()


def by_create_graph(model: torch.nn.Module, value: Tensor) -> None:
    value.backward(create_graph=True)
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.detach()  # or it would keep the graph in a cycle


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_gradient_penalty_counts(lazy: bool, mode: str):
    """What has a gradient of it alone is not frozen, and FREEZE replays its masks; `lazy`: with its own backward."""
    case = Case(LoopMLP, (4,), mode=mode, decay="constant", seed=9)
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    inner = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = handle.wrap(inner)
    drawn: list[list[Tensor]] = []
    for step in range(16):
        optimizer.zero_grad()
        x = model.rows(2, step).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(x).square()), x, create_graph=True)
        drawn.append([handle.masks])
        penalty = (gradient.square().sum() - 1).square()
        if lazy:
            penalty.backward()
        value = loss(model(model.rows(2, 50 + step)))
        drawn[-1].append(handle.masks)
        (value if lazy else value + penalty).backward()
        live = set().union(*(case.live(masks, handle.phase) for masks in drawn[-1]))
        named = {name for branch in handle.branches for name in branch.parameters}
        assert set(handle.frozen) == named - live
        optimizer.step()
    for dropped, replayed in zip(drawn[::2], drawn[1::2], strict=True):
        assert all(map(torch.equal, dropped, replayed))


@pytest.mark.parametrize("teach", [by_autograd_grad, by_combined_gradients, by_attack, by_create_graph])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_ways_to_gradients(teach: Teach, mode: str):
    """All but `backward()` and `step()`: a step is that of the plain loop, with what it freezes."""
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode=mode, decay="constant", seed=4)
    ends = []
    for how in (None, teach):
        model = case.model()
        handle = case.attach(model)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = handle.wrap(inner)
        frozen = []
        for step in range(8):
            optimizer.zero_grad()
            value = loss(model(model.rows(4, step)))
            if how is None:
                value.backward()
            else:
                how(model, value)
            frozen.append(handle.frozen)
            optimizer.step()
        ends.append((snapshot(model, inner), frozen))
        assert any(frozen)
    assert ends[0][1] == ends[1][1]
    torch.testing.assert_close(ends[0][0], ends[1][0])


def test_a_loss_that_is_not_made_of_what_the_model_returns():
    """Features that are caught on their way count as much as an output."""
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode="batch", decay="constant", seed=4)
    model = case.model()
    handle = case.attach(model)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = handle.wrap(inner)
    caught: list[Tensor] = []
    model.body[2].register_forward_hook(lambda module, args, output: caught.append(output))
    frozen = 0
    for step in range(12):
        optimizer.zero_grad()
        model(model.rows(4, step))
        value = loss(caught.pop())
        if not value.requires_grad:
            continue
        value.backward()
        before = snapshot(model, inner)
        still = set(handle.frozen)
        optimizer.step()
        after = snapshot(model, inner)
        assert all(identical(before[name], after[name]) for name in still)
        frozen += len(still)
    assert frozen > 0


def test_a_forward_that_raised_gives_its_position_back():
    """Though the traceback, and with it the graph, is still held."""
    case = Case(BlockMLP, (("plain", "norm", "plain"),), decay="constant", seed=1)
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    body, broken = model.body[2].forward, []

    def fail(x: Tensor) -> Tensor:
        if broken:
            raise RuntimeError("out of memory")
        return body(x)

    model.body[2].forward = fail
    broken.append(True)
    with pytest.raises(RuntimeError, match="out of memory") as held:
        model(model.rows(4, 0))
    first = handle.masks
    broken.clear()
    loss(model(model.rows(4, 0))).backward()
    assert torch.equal(handle.masks, first)
    assert held.value is not None
    gc.collect()


class Boxed:
    """A container that nobody knows."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("returns", ["an object", "a view that is written to", "adapters alone learn"])
def test_each_of_two_micro_batches_has_its_masks_again(returns):
    """Also where no gate has a graph, since all is frozen, and the end of the forward is out of sight."""
    case = Case(LoopMLP, (3,), mode="batch", decay="constant", seed=0)
    met = set()
    for seed in range(40):
        model = case.model()
        handle = case.attach(model, seed=seed, example_inputs=model.rows(2, 0))
        if returns == "adapters alone learn":
            inside = {name for branch in handle.branches for name in branch.parameters}
            for name, p in model.named_parameters():
                p.requires_grad_(name in inside)
        optimizer = handle.wrap(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01))
        if returns == "an object":
            model.register_forward_hook(lambda module, args, output: Boxed(output))
        drawn = []
        for number in range(4):
            x = model.rows(2, number).requires_grad_()
            output = model(x)
            drawn.append(handle.masks)
            output = output.value if isinstance(output, Boxed) else output
            if returns == "a view that is written to":
                output = output[:, 0]
                output -= 1.0
            loss(output).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        met |= {bool(masks.all()) for masks in drawn} | {bool(masks.any()) for masks in drawn}
        assert torch.equal(drawn[0], drawn[2])
        assert torch.equal(drawn[1], drawn[3])
    assert met == {False, True}


def test_an_optimizer_that_raises_leaves_the_step_to_be_tried_again():
    """Out of memory for its state, say: the batch is thrown away, and the next try has the same masks."""

    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                Fails.fails = False
                raise RuntimeError("out of memory")
            return super().step(closure)

    case = Case(LoopMLP, (4,), mode="batch", decay="constant", seed=3)
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(Fails(model.parameters(), lr=0.1))
    loss(model(model.rows(2, 0))).backward()
    first = handle.masks
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(model.rows(2, 0))).backward()
        assert torch.equal(handle.masks, first)
        optimizer.step()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["paused", "eval"])
def test_a_plain_forward_with_checkpoints_is_recomputed_plainly(how, reentrant):
    """After a gated one in the same step, whose masks were recomputed with just before."""

    def gradients(gated_before: bool) -> list[Tensor | None]:
        case = Case(BlockMLP, (("plain", "plain", "plain"),), decay="constant", rate=0.8, seed=3)
        model = case.model()
        handle = case.attach(model, example_inputs=model.rows(2, 0))
        for block in model.body:
            run = block.forward
            block.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=reentrant)
        if gated_before:
            loss(model(model.rows(4, 0).requires_grad_())).backward()
            model.zero_grad()
        with handle.paused() if how == "paused" else contextlib.nullcontext():
            model.train(how == "paused")
            loss(model(model.rows(4, 1).requires_grad_())).backward()
        return [p.grad for p in model.parameters()]

    assert identical(gradients(True), gradients(False))
