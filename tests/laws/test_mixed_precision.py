"""Mixed precision: dtypes stay, an overflow in a dropped branch is dropped with it, and GradScaler's skips count."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rdp
from laws.architectures import BlockMLP
from laws.strategies import Case, batch_sizes, cases
from laws.training import identical, loss, snapshot


def record_dtypes(model: nn.Module) -> dict[str, set[torch.dtype]]:
    """The dtypes that every module of `model` returns from now on."""
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():

        def record(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            first = output[0] if isinstance(output, tuple) else output
            dtypes.setdefault(name, set()).add(first.dtype)

        record.__module__ = "torch"  # for the sake of a hook of the user's a branch would run dense
        module.register_forward_hook(record)
    return dtypes


@given(cases(batch_norm=False, dropout=False, dtypes=(torch.float32,)), batch_sizes(4, 2))
def test_autocast_keeps_every_activation_in_its_dtype(case, sizes):
    plain, model = case.model(), case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    dtypes = [record_dtypes(net) for net in (plain, model)]
    for step in range(2):
        for size in sizes:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for net in (plain, model):
                    loss(net(net.rows(size, step)).float()).backward()
        handle.advance()
    assert dtypes[0] == dtypes[1]
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


@given(
    st.sampled_from(["row", "batch"]),
    st.sampled_from(["auto", "dense"]),
    st.sampled_from([float("inf"), float("nan")]),
    st.integers(0, 2**16),
)
def test_an_overflow_in_a_dropped_branch_is_dropped_with_it(mode, compute, value, seed):
    """Zero times inf is nan: a dropped branch is selected away, not multiplied away; and so is its gradient."""
    case = Case(BlockMLP, (("plain", "in_place"),), 0.7, mode=mode, compute=compute, decay="constant", seed=seed)
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    with torch.no_grad():
        model.body[1].fc2.bias.fill_(value)
    output = model(model.rows(6, 0))
    kept = handle.masks[1]
    assert torch.equal(output.isfinite().all(1), ~kept)
    loss(output[~kept]).backward()
    for name in ("stem", "body.0"):
        assert all(p.grad.isfinite().all() for p in model.get_submodule(name).parameters() if p.grad is not None)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_a_step_that_the_scaler_skips_is_no_step(fused, value):
    case = Case(BlockMLP, (("plain", "norm"),), decay="constant", dtype=torch.float32)
    model = case.model()
    handle = case.attach(model)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    optimizer = handle.wrap(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss(model(model.rows(4, 0))) * value).backward()
    before, masks = snapshot(model, inner), handle.masks.clone()
    scaler.step(optimizer)
    scaler.update()
    skipped = value != 1.0
    assert handle.step_count == (0 if skipped else 1)
    assert handle.phase is (rdp.Phase.DROP if skipped else rdp.Phase.FREEZE)
    if skipped:
        assert identical({n: v[0] for n, v in before.items()}, {n: v[0] for n, v in snapshot(model, inner).items()})
        optimizer.zero_grad()
        model(model.rows(4, 1))
        assert torch.equal(handle.masks, masks), "the step that is tried again has the masks of the first try"


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_scaled_training_equals_unscaled_training(fused, unscale, mode):
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode=mode, decay="constant", dtype=torch.float64, seed=2)
    ends = []
    for scaled in (False, True):
        model = case.model()
        handle = case.attach(model)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused)
        optimizer = handle.wrap(inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(8):
            scaler.scale(loss(model(model.rows(3, step)))).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append((snapshot(model, inner), handle.state_dict()))
    assert identical(*ends)


def test_the_scaler_finds_gradients_when_every_branch_is_frozen():
    """All gradients `None` make GradScaler assert "No inf checks were recorded": they are hidden in `step` only."""
    torch.manual_seed(0)
    model = BlockMLP(("plain",))
    model.stem, model.head = torch.nn.ConstantPad1d((0, 1), 1.0), torch.nn.Identity()
    handle = rdp.attach(model, rate=0.9, mode="batch", decay="constant")
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = handle.wrap(inner)
    scaler = torch.amp.GradScaler("cpu")
    frozen = 0
    for step in range(10):
        scaler.scale(loss(model(model.rows(3, step)))).backward()
        before = copy.deepcopy(list(model.parameters()))
        phase, dropped = handle.phase, not bool(handle.masks.any())
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if dropped == (phase is rdp.Phase.DROP):
            assert identical(before, list(model.parameters()))
            frozen += 1
        optimizer.zero_grad()
    assert frozen > 0
    assert handle.step_count == 10
