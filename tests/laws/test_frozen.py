"""Law 3: without a live path a parameter and its optimizer state are bit-identical across a step; live ones move."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rdp
from laws.architectures import BlockMLP, Transformer
from laws.strategies import Case, batch_sizes, cases, every_architecture
from laws.training import Spy, identical, loss, snapshot

BOOL = st.booleans()
DECAY = st.sampled_from([0.0, 0.1])
FOREACH = {"foreach": st.sampled_from([None, True, False]), "maximize": BOOL}


def fused_or(foreach: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """`fused` excludes `foreach`."""
    return st.one_of(st.just({"fused": True}), st.fixed_dictionaries(foreach))


def options(cls: type, *, fused: bool = False, **drawn: Any) -> st.SearchStrategy[tuple[type, dict[str, Any]]]:
    shared = fused_or(FOREACH) if fused else st.fixed_dictionaries(FOREACH)
    return st.tuples(st.just(cls), st.tuples(shared, st.fixed_dictionaries(drawn)).map(lambda two: two[0] | two[1]))


MATRICES_ONLY = [torch.optim.Muon] if hasattr(torch.optim, "Muon") else []  # since torch 2.9

# SparseAdam wants sparse gradients and LBFGS has one state for all parameters; both have tests in test_optim.py.
OPTIMIZERS = st.one_of(
    options(torch.optim.SGD, fused=True, lr=st.just(0.1), momentum=st.sampled_from([0.0, 0.9]), weight_decay=DECAY),
    options(torch.optim.SGD, lr=st.just(0.1), momentum=st.just(0.9), nesterov=BOOL, weight_decay=DECAY),
    options(torch.optim.Adam, fused=True, lr=st.just(0.1), amsgrad=BOOL, weight_decay=DECAY),
    options(torch.optim.AdamW, fused=True, lr=st.just(0.1), amsgrad=BOOL, weight_decay=DECAY),
    options(torch.optim.Adagrad, lr=st.just(0.1), weight_decay=DECAY),
    options(torch.optim.NAdam, lr=st.just(0.1), weight_decay=DECAY),
    options(torch.optim.RAdam, lr=st.just(0.1), weight_decay=DECAY),
    options(torch.optim.Adamax, lr=st.just(0.1), weight_decay=DECAY),
    options(torch.optim.Adadelta, lr=st.just(1.0), weight_decay=DECAY),
    options(torch.optim.RMSprop, lr=st.just(0.1), momentum=st.sampled_from([0.0, 0.9]), centered=BOOL),
    options(torch.optim.Rprop, lr=st.just(0.1)),
    options(torch.optim.ASGD, lr=st.just(0.1), weight_decay=DECAY),
    options(torch.optim.Adafactor, lr=st.just(0.1), weight_decay=DECAY),
    *(
        st.tuples(st.just(cls), st.fixed_dictionaries({"lr": st.just(0.1), "weight_decay": DECAY}))
        for cls in MATRICES_ONLY
    ),
)


def optimize(model: torch.nn.Module, cls: type, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if cls not in MATRICES_ONLY or p.dim() == 2]
    return cls(parameters, **arguments)


@every_architecture(
    optimizer=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    set_to_none=False,
    steps=[[2], [2], [1, 1], [2, 1]],
)
@given(cases(scales=(False,)), OPTIMIZERS, BOOL, st.lists(batch_sizes(4, 2), min_size=2, max_size=4))
def test_frozen_is_bit_identical_and_live_moves(case, optimizer, set_to_none, steps):
    model = case.model()
    handle = case.attach(model)
    inner = optimize(model, *optimizer)
    wrapped, spy = handle.wrap(inner), Spy(inner, model)
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    for step, sizes in enumerate(steps):
        phase, live = handle.phase, set()
        for k, size in enumerate(sizes):
            loss(model(model.rows(size, 10 * step + k))).backward()
            live |= case.live(handle.masks, phase)
        before = snapshot(model, inner)
        wrapped.step()
        after = snapshot(model, inner)
        for name, p in model.named_parameters():
            if id(p) not in trained:
                continue
            if name not in live:
                assert identical(before[name], after[name]), f"{name} is frozen in {phase} and moved"
            elif spy.gradients[name].abs().max() > 1e-6:
                # Rprop waits out one step, on purpose, where a gradient changes its sign; its state moves
                part = slice(None) if optimizer[0] is torch.optim.Rprop else slice(1)
                moved = not identical(before[name][part], after[name][part])
                assert moved, f"{name} is live in {phase} and did not move"
        wrapped.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_parameter_two_branches_share_is_frozen_only_when_both_are(set_to_none):
    """A norm read by two parallel branches belongs to neither, and momentum moves it on a gradient of zero."""
    case = Case(Transformer, ("parallel", 1), mode="batch", decay="constant", seed=1)
    model = case.model()
    handle = case.attach(model)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    optimizer = handle.wrap(inner)
    seen = set()
    for step in range(40):
        loss(model(model.rows(3, step))).backward()
        phase, masks = handle.phase, handle.masks[:, 0]
        live = bool(masks.any() if phase is rdp.Phase.DROP else (~masks).any())
        before = snapshot(model, inner)["body.0.norm.weight"]
        optimizer.step()
        assert identical(before, snapshot(model, inner)["body.0.norm.weight"]) is not live
        optimizer.zero_grad(set_to_none=set_to_none)
        seen.add((phase, live))
    assert len(seen) == 4, "the seed must show both phases, frozen and live"


@given(st.integers(0, 2**16), st.sampled_from(["row", "batch"]), st.integers(1, 3))
def test_with_every_branch_frozen_a_model_of_branches_alone_stays_put(seed, mode, rows):
    """No parameter has a live path: the loss must still have a backward, and the step must move nothing."""
    torch.manual_seed(seed)

    model = BlockMLP(("plain", "norm")).double()
    model.stem, model.head = torch.nn.Identity(), torch.nn.Identity()
    model.body.insert(0, torch.nn.ConstantPad1d((0, 1), 1.0))
    handle = rdp.attach(model, rate=0.9, mode=mode, decay="constant", seed=seed)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = handle.wrap(inner)
    for step in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(model(model.rows(rows, step))).backward()
        masks = handle.masks if handle.phase is rdp.Phase.DROP else ~handle.masks
        before = snapshot(model, inner)
        optimizer.step()
        after = snapshot(model, inner)
        for name in before:
            live = bool(masks[int(name.split(".")[1]) - 1].any())
            assert identical(before[name], after[name]) or live
        optimizer.zero_grad()
