"""Rates that change over training: a cycle has the rate of its DROP, and one of rate 0 is plain, bit for bit."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdp
from laws.architectures import BlockMLP, LoopMLP, Transformer
from laws.masks import draw
from laws.oracle import branch_rates, oracle_forward
from laws.strategies import Case, batch_sizes, cases
from laws.training import Spy, identical, loss, snapshot

rate_schedules = rdp.rate_schedules
early, late, linear, warmup = (getattr(rate_schedules, name) for name in ("early", "late", "linear", "warmup"))

FACTORS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=4)
BY_HAND = st.dictionaries(st.integers(0, 7), st.sampled_from([0.0, 0.3, 0.6]), max_size=3)


def of_cycles(factors: list[float]):
    """A schedule that has them in the cycles of DROP and FREEZE, and noise between, where nobody should ask."""
    return lambda step: factors[step // 2 % len(factors)] if step % 2 == 0 else 0.777


def expected_rates(case: Case, factors: list[float], by_hand: dict[int, float], step: int) -> list[float]:
    """What is set before the first forward of a DROP step holds from there on, what is set in FREEZE from the next."""
    drop = step - step % 2
    *_, rate = case.rate, *(rate for at, rate in sorted(by_hand.items()) if at <= drop)
    return branch_rates(case.model().blocks, rate * factors[step // 2 % len(factors)], case.decay)


@settings(max_examples=30)
@given(cases(dropout=False), FACTORS, BY_HAND, st.lists(batch_sizes(5, 2), min_size=2, max_size=6))
def test_masks_and_updates_are_those_of_an_oracle_with_a_rate_for_each_cycle(case, factors, by_hand, steps):
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model, rate_schedule=of_cycles(factors), example_inputs=model.rows(2, 0))
    inner, plain = (
        torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1) for m in (model, reference)
    )
    optimizer = handle.wrap(inner)
    for step, sizes in enumerate(steps):
        if step in by_hand:
            handle.rate = by_hand[step]
        rates, phase = expected_rates(case, factors, by_hand, step), ("DROP", "FREEZE")[step % 2]
        assert handle.rates == pytest.approx(rates)
        live: set[str] = set()
        of_drop = steps[step - step % 2]
        for k, rows in enumerate(sizes):
            number = 0 if case.freeze == "params" else k % len(of_drop)
            among = (rows if step % 2 == 0 else of_drop[number]) if case.sampling == "fixed" else None
            where = {"seed": case.seed, "cycle": step // 2, "micro_batch": number, "mode": case.mode}
            masks = torch.tensor(draw(rates, rows, fixed_among=among, **where))
            x = model.rows(rows, 10 * step + k)
            output = model(x)
            assert torch.equal(handle.masks, masks)
            how = phase if any(rates) else "PLAIN"
            wanted = oracle_forward(reference, x, masks, how, rates, case.freeze, case.scale_by_keep)
            torch.testing.assert_close(output, wanted)
            loss(output).backward()
            loss(wanted).backward()
            live |= case.live(masks, rdp.Phase[how])
        assert handle.phase.name == phase
        assert set(handle.frozen).isdisjoint(live)
        for name, p in reference.named_parameters():
            p.grad = p.grad if name in live else None
        optimizer.step()
        plain.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        optimizer.zero_grad()
        plain.zero_grad()


@settings(max_examples=30)
@given(
    cases(dtypes=(torch.float64, torch.float32)),
    st.sampled_from(["schedule", "attached with 0", "by hand"]),
    st.lists(batch_sizes(4, 2), min_size=2, max_size=4),
)
def test_a_cycle_of_factor_0_trains_bit_identically_to_no_rdp(case, how, steps):
    plain, model = case.model(), case.model()
    changes = {"schedule": {"rate_schedule": late(100)}, "attached with 0": {"rate": 0.0}, "by hand": {}}[how]
    handle = case.attach(model, **changes)
    if how == "by hand":
        handle.rate = 0
    ends = []
    for net, wrap in ((plain, lambda o: o), (model, handle.wrap)):
        inner = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = wrap(inner)
        torch.manual_seed(case.seed)
        outputs = []
        for step, sizes in enumerate(steps):
            for k, rows in enumerate(sizes):
                outputs.append(net(net.rows(rows, 10 * step + k)))
                loss(outputs[-1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((outputs, snapshot(net, inner), dict(net.named_buffers()), torch.get_rng_state()))
    assert identical(*ends)
    assert handle.masks.all()
    assert handle.frozen == ()


@settings(max_examples=30)
@given(cases(dropout=False), FACTORS, BY_HAND, st.lists(batch_sizes(4, 2), min_size=2, max_size=6), st.integers(0, 5))
def test_a_run_is_resumed_at_any_step_with_the_same_rates_and_masks(case, factors, by_hand, steps, at):
    ends = []
    for resume in (False, True):
        model = case.model()
        schedule = of_cycles(factors)
        handle = case.attach(model, rate_schedule=schedule, example_inputs=model.rows(2, 0))
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer, seen = handle.wrap(inner), []
        for step, sizes in enumerate(steps):
            if step in by_hand:
                handle.rate = by_hand[step]
            for k, rows in enumerate(sizes):
                if resume and step == at and k == len(sizes) - 1:  # also between two micro-batches
                    saved = copy.deepcopy((model.state_dict(), inner.state_dict(), handle.state_dict()))
                    gradients = [p.grad for p in model.parameters()]
                    model = case.model()
                    handle = case.attach(model, rate_schedule=schedule, example_inputs=model.rows(2, 0))
                    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
                    optimizer = handle.wrap(inner)
                    for holder, state in zip((model, inner, handle), saved, strict=True):
                        holder.load_state_dict(state)
                    for p, gradient in zip(model.parameters(), gradients, strict=True):
                        p.grad = gradient
                loss(model(model.rows(rows, 10 * step + k))).backward()
                seen.append((handle.masks, handle.rates, handle.rate))
            optimizer.step()
            optimizer.zero_grad()
        ends.append((seen, snapshot(model, inner), handle.state_dict()))
    assert identical(*ends)


MODELS = [
    Case(LoopMLP, (3,), rate=0.5, decay="constant", seed=4),
    Case(BlockMLP, (("plain", "norm"),), rate=0.5, mode="batch", decay="constant", seed=1),
    Case(Transformer, ("pre_norm", 2), rate=0.5, sampling="fixed", decay="constant", seed=2),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
def test_a_rate_that_is_set_between_drop_and_freeze_waits_for_the_next_drop(case):
    model = case.model()
    handle = case.attach(model, rate=0.0, example_inputs=model.rows(2, 0))
    assert not any(handle.rates)
    handle.rate = 0.5  # no forward of the first step has begun
    assert all(rate == 0.5 for rate in handle.rates)
    loss(model(model.rows(6, 0))).backward()
    dropped = handle.masks
    handle.rate = 0.25
    assert (handle.rate, handle.rates[-1], handle.branches[-1].rate) == (0.25, 0.5, 0.25)
    handle.advance()
    loss(model(model.rows(6, 1))).backward()
    assert torch.equal(handle.masks, dropped)
    assert "rate=0.25, now 0.5" in str(handle)
    handle.advance()
    assert handle.rates[-1] == 0.25
    assert "now" not in str(handle)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
def test_another_schedule_at_the_same_step_is_told_and_changes_nothing(case):
    model = case.model()
    handle = case.attach(model, rate_schedule=warmup(100), example_inputs=model.rows(2, 0))
    for _ in range(51):
        handle.advance()
    state = handle.state_dict()
    assert (state["factor"], state["cycle_rate"]) == (0.5, 0.25)
    for schedule in (None, warmup(200)):
        other = case.attach(m := case.model(), rate_schedule=schedule, example_inputs=m.rows(2, 0))
        before = other.state_dict()
        with pytest.raises(rdp.StateError, match=r"another rate_schedule: it gave 0.5 at step 50"):
            other.load_state_dict(state)
        assert other.state_dict() == before
        other.load_state_dict(state | {"factor": None})
        assert other.rates == handle.rates, "the cycle ends as it began"
        other.advance()
        assert other.rates[-1] == pytest.approx(0.5 if schedule is None else 0.13)
    early_handle = case.attach(m := case.model(), rate_schedule=warmup(100))  # its branches are not known yet
    early_handle.load_state_dict(state)
    early_handle.discover(m.rows(2, 0))
    assert early_handle.rates == handle.rates


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (warmup(4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (early(2), [1, 1, 0, 0, 0, 0]),
        (late(2), [0, 0, 1, 1, 1, 1]),
        (linear(1, 3), [0, 0, 0.5, 1, 1, 1]),
        (linear(4, 0), [1, 0.75, 0.5, 0.25, 0, 0]),
        (warmup(2) * early(4), [0, 0.5, 1, 1, 0, 0]),
        ((lambda step: 0.5) * late(1), [0, 0.5, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_factors_of_schedules(schedule, expected):
    assert [schedule(step) for step in range(6)] == expected


@pytest.mark.parametrize("schedule", [warmup(4), early(2), late(2), linear(3, 1), warmup(2) * early(4) * late(1)])
def test_schedules_are_pickled_and_compared(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert [again(step) for step in range(6)] == [schedule(step) for step in range(6)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: warmup(0), lambda: warmup(1.5), lambda: early(-1), lambda: late(True), lambda: linear(3, 3),
        lambda: rate_schedules.linear("0", 3),
    ],
)  # fmt: skip
def test_what_is_no_number_of_steps_is_refused(make):
    with pytest.raises(rdp.ArgumentError, match="step"):
        make()


@pytest.mark.parametrize("factor", [-0.1, 1.5, float("nan"), None, "1", torch.tensor(0.5)])
def test_what_is_no_factor_is_refused_with_the_step(factor):
    model = MODELS[0].model()
    with pytest.raises(rdp.ArgumentError, match=r"rate_schedule\(0\) returned .* a number in \[0, 1\]"):
        MODELS[0].attach(model, rate_schedule=lambda step: factor, example_inputs=model.rows(2, 0))
    assert identical(model(x := model.rows(2, 0)), MODELS[0].model()(x))
    with pytest.raises(rdp.ArgumentError, match="rate_schedule must be a function"):
        MODELS[0].attach(model, rate_schedule=0.5)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, float("nan"), "0.1", True, None])
def test_what_is_no_rate_is_refused_and_the_old_one_stays(rate):
    handle = MODELS[0].attach(MODELS[0].model())
    with pytest.raises(rdp.ArgumentError, match="rate must be a number"):
        handle.rate = rate
    assert handle.rate == 0.5


def test_what_the_handle_does_not_have_cannot_be_set():
    handle = MODELS[0].attach(MODELS[0].model())
    for name in ("rates", "drop_rate", "seed", "phase"):
        with pytest.raises(AttributeError):
            setattr(handle, name, 0.1)
    with pytest.raises(rdp.UnknownAttributeError, match=r"has no 'drop_rate' to set; only handle.rate"):
        handle.drop_rate = 0.1
    handle.remove()
    with pytest.raises(rdp.AttachError, match="removed"):
        handle.rate = 0.1


def test_the_gradients_of_a_rescaled_drop_are_those_of_its_cycle():
    case = replace(MODELS[0], scale_by_keep=True)
    model = case.model()
    handle = case.attach(model, phases=(rdp.Phase.DROP,), rate_schedule=lambda step: (0.5, 1.0)[step % 2])
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.0))
    spy = Spy(optimizer.optimizer, model)
    for step in range(4):
        x = model.rows(5, step)
        loss(model(x)).backward()
        masks = handle.masks
        optimizer.step()
        optimizer.zero_grad()
        twin = case.model()
        rates = [0.25, 0.5][step % 2 :][:1] * len(masks)
        loss(oracle_forward(twin, x, masks, "DROP", rates, "output", True)).backward()
        for name, p in twin.named_parameters():
            if spy.gradients[name] is not None:
                torch.testing.assert_close(spy.gradients[name], p.grad)
