"""Law 8: a forward counts for a step when a backward has reached it and its gradients are there when the step ends.

Nobody announces what becomes of a forward: it is learnt from, logged, skipped before its backward, or its gradients are
thrown away, in any order. The oracle is the rule itself, on a list of what happened:

- a forward takes the lowest position that none of its step holds; one is held while its forward may still learn, or
  once it has learnt and its gradients remain;
- DROP draws by position; FREEZE gives a position the masks of what counted there in DROP. Early positions that DROP
  left empty get the masks that counted late, so that as many forwards replay all of them; where FREEZE has more, it
  begins again;
- gradients are thrown away when they are gone, or were changed by something else than a backward and another backward
  follows; what is done to them after the last backward clears nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

import rdp
from laws.architectures import BlockMLP, LoopMLP
from laws.masks import draw
from laws.strategies import Case, cases
from laws.training import identical, loss, snapshot

NONE = ("optimizer.zero_grad()", "model.zero_grad()", "p.grad = None")
ZERO = ("optimizer.zero_grad(set_to_none=False)", "model.zero_grad(set_to_none=False)")
EDITED = ("clip", "unscale")


@dataclass
class Seen:
    """A forward as the rule sees it."""

    position: int
    rows: int
    drawn: tuple[int, int]
    """The position in DROP whose masks it has, and the rows of the forward that was there."""
    masks: Tensor
    loss: Tensor | None
    learnt: bool = False


@dataclass
class Rule:
    """What should become of the forwards of each step."""

    case: Case
    cycle: int = 0
    phase: rdp.Phase = rdp.Phase.DROP
    seen: list[Seen] = field(default_factory=list)
    replay: dict[int, tuple[int, int]] = field(default_factory=dict)
    changed: bool = False
    """Have gradients been changed since the latest backward?"""
    gone: bool = False

    def begins(self, rows: int) -> tuple[int, tuple[int, int]]:
        held = {s.position for s in self.seen if (s.learnt and not self.changed) or (s.loss is not None)}
        position = min(set(range(len(held) + 1)) - held)
        number = 0 if self.case.freeze == "params" else position
        if self.phase is rdp.Phase.DROP or not self.replay:
            return position, (number, rows)
        return position, self.replay.get(number) or self.replay[number % self.counted_in_drop]

    counted_in_drop: int = 0

    def masks(self, rows: int, drawn: tuple[int, int]) -> Tensor:
        number, drawn_rows = drawn
        fixed = drawn_rows if self.case.sampling == "fixed" else None
        arguments: dict[str, Any] = {"seed": self.case.seed, "cycle": self.cycle, "mode": self.case.mode}
        return torch.tensor(draw(self.case.rates, rows, micro_batch=number, fixed_among=fixed, **arguments))

    def learns(self, forward: Seen) -> None:
        if self.changed:
            for earlier in self.seen:
                earlier.learnt = False
        forward.learnt, forward.loss, self.changed, self.gone = True, None, False, False

    def clears(self, gone: bool) -> None:
        if any(s.learnt for s in self.seen):
            self.changed, self.gone = True, self.gone or gone

    def counted(self) -> list[Seen]:
        return [] if self.gone else [s for s in self.seen if s.learnt]

    def ends(self, announced: bool) -> None:
        """Who announces a step may have cleared by then the gradients that were used for it."""
        if self.phase is rdp.Phase.DROP:
            used = [s for s in self.seen if s.learnt] if announced else self.counted()
            self.replay = {s.drawn[0]: s.drawn for s in used}
            self.counted_in_drop = len(self.replay)
            early = [k for k in range(self.counted_in_drop) if k not in self.replay]
            late = [k for k in sorted(self.replay) if k >= self.counted_in_drop]
            self.replay |= {k: self.replay[other] for k, other in zip(early, late, strict=True)}
        self.cycle += self.phase is rdp.Phase.FREEZE
        self.phase = rdp.Phase.FREEZE if self.phase is rdp.Phase.DROP else rdp.Phase.DROP
        self.seen, self.changed, self.gone = [], False, False


def clear(how: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if how == "p.grad = None":
        for p in model.parameters():
            p.grad = None
    elif how == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    elif how == "unscale":
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
    else:
        owner = optimizer if how.startswith("optimizer") else model
        owner.zero_grad(set_to_none="False" not in how)


ROWS = st.integers(1, 4)
EVENTS = st.one_of(
    st.tuples(st.just("learn"), ROWS),
    st.tuples(st.just("learn"), ROWS),
    st.tuples(st.sampled_from(["skip", "log"]), ROWS),
    st.tuples(st.just("late"), st.integers(0, 2)),
    st.tuples(st.just("clear"), st.sampled_from(NONE + ZERO)),
)
STEPS = st.lists(st.tuples(st.lists(EVENTS, max_size=6), st.sampled_from((None, *EDITED))), min_size=2, max_size=4)


@given(cases(scales=(False,), dropout=False), STEPS, st.sampled_from(NONE + ZERO), st.booleans())
def test_any_interleaving_of_forwards_replays_and_freezes_as_the_rule_says(case, steps, between, wrapped):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = handle.wrap(inner) if wrapped else inner
    rule, number = Rule(case), 0

    def forward(rows: int) -> Seen:
        nonlocal number
        number += 1
        position, drawn = rule.begins(rows)
        value = loss(model(model.rows(rows, number)))
        expected = rule.masks(rows, drawn)
        assert torch.equal(handle.masks, expected), f"position {position} of {rule.phase}"
        seen = Seen(position, rows, drawn, expected, value)
        rule.seen.append(seen)
        return seen

    for events, last in steps:
        for what, how in events:
            if what == "learn":
                now = forward(how)
                now.loss.backward()
                rule.learns(now)
            elif what == "skip":
                forward(how).loss = None
            elif what == "log":
                forward(how)
            elif what == "clear":
                clear(how, model, inner)
                rule.clears(gone=how in NONE)
            elif waiting := [s for s in rule.seen if s.loss is not None][how:]:
                waiting[0].loss.backward()
                rule.learns(waiting[0])
            event(what)
        if last is not None:
            clear(last, model, inner)
        counted = rule.counted()
        live = set().union(*(case.live(s.masks, rule.phase) for s in counted))
        before = snapshot(model, inner)
        if counted:
            named = {name for branch in handle.branches if branch.rate > 0 for name in branch.parameters}
            assert set(handle.frozen) == named - live
        assert handle.phase is rule.phase
        if wrapped:
            optimizer.step()
            after = snapshot(model, inner)
            for name in before:
                assert identical(before[name], after[name]) or name in live or not counted, f"{name} moved"
        else:
            handle.advance()
        rule.ends(announced=not wrapped)
        clear(between, model, inner)


@pytest.mark.parametrize("how", NONE + ZERO)
@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_batch_that_is_thrown_away_is_as_if_it_had_not_been(how, alive, mode):
    """Its loss was nan, say; `alive`: the loop still holds it when the next forward begins."""
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode=mode, decay="constant", seed=3)
    ends = []
    for thrown in (False, True):
        model = case.model()
        handle = case.attach(model)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = handle.wrap(inner)
        for step in range(8):
            clear(how, model, inner)
            if thrown and step % 3 == 0:
                value = loss(model(model.rows(5, 77))) * float("nan")
                value.backward()
                clear(how, model, inner)
                if not alive:
                    del value
            loss(model(model.rows(4, step))).backward()
            optimizer.step()
        assert handle.check().ok, str(handle.check())
        ends.append((snapshot(model, inner), handle.masks))
    assert identical(*ends)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_nan_loss_that_is_skipped_before_its_backward(mode):
    """The loop's own variable holds the skipped graph until the next loss is there; FREEZE replays what learnt."""
    case = Case(LoopMLP, (4,), mode=mode, decay="constant", seed=5)
    model = case.model()
    handle = case.attach(model)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    learnt = []
    for i in range(16):
        optimizer.zero_grad()
        value = loss(model(model.rows(3, i)))
        if i % 5 == 0:
            continue
        value.backward()
        phase, masks = handle.phase, handle.masks
        learnt.append(masks)
        live = case.live(masks, phase)
        named = {name for branch in handle.branches for name in branch.parameters}
        assert set(handle.frozen) == named - live
        optimizer.step()
    assert all(map(torch.equal, learnt[:-1:2], learnt[1::2]))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("switched_off", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_discriminator_is_not_taught_by_its_generators_step(set_to_none, switched_off, mode):
    """Its forward for the generator is reached by a backward, but its gradients are zeroed, or never made."""
    case = Case(LoopMLP, (4,), mode=mode, decay="constant", seed=4)
    model = case.model()
    handle = case.attach(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    optimizer = handle.wrap(inner)
    bias = torch.zeros_like(model.rows(1, 0)).requires_grad_()
    frozen = 0
    for i in range(12):
        model.requires_grad_(True)
        optimizer.zero_grad(set_to_none=set_to_none)
        live, phase, total = set(), handle.phase, torch.zeros(())
        for k in range(2):
            total = total + loss(model(model.rows(2, 2 * i + k)))
            live |= case.live(handle.masks, phase)
        total.backward()
        before = snapshot(model, inner)
        optimizer.step()
        after = snapshot(model, inner)
        frozen += len(before.keys() - live)
        assert all(identical(before[name], after[name]) for name in before.keys() - live)
        model.requires_grad_(not switched_off)
        loss(model(model.rows(2, 99) + bias)).backward()
    assert frozen > 0
    assert handle.check().ok, str(handle.check())
