"""Law 4: rate 0 trains bit-identically to no RDP, eval is the plain network, `remove` restores the model exactly."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

import rdp
from laws.strategies import batch_sizes, cases
from laws.test_frozen import OPTIMIZERS, optimize
from laws.training import anatomy, identical, loss, seed, snapshot


@given(
    cases(rates=st.just(0.0), dtypes=(torch.float64, torch.float32)),
    OPTIMIZERS,
    st.lists(batch_sizes(4, 2), min_size=1, max_size=4),
    st.booleans(),
)
def test_rate_zero_trains_bit_identically_to_no_rdp(case, optimizer, steps, set_to_none):
    plain, model = case.model(), case.model()
    handle = case.attach(model)
    inner = optimize(model, *optimizer)
    ends = []
    for net, opt, inner_opt in (
        (plain, o := optimize(plain, *optimizer), o),
        (model, handle.wrap(inner), inner),
    ):
        seed(case.seed)
        outputs = []
        for sizes in steps:
            for size in sizes:
                # data comes from the global generator, as in any loop that shuffles or augments
                outputs.append(net(torch.randn(size, *net.row_shape, dtype=case.dtype)))
                loss(outputs[-1]).backward()
            opt.step()
            opt.zero_grad(set_to_none=set_to_none)
        gradients = [p.grad for p in net.parameters()]
        ends.append((outputs, gradients, snapshot(net, inner_opt), dict(net.named_buffers()), torch.get_rng_state()))
    assert identical(*ends)


@given(cases(), batch_sizes(4, 1), st.integers(0, 3))
def test_eval_is_the_plain_network(case, sizes, steps):
    model = case.model()
    handle = case.attach(model)
    for step in range(steps):
        loss(model(model.rows(sizes[0], step))).backward()
        handle.advance()
    plain = case.model()
    plain.load_state_dict(model.state_dict())
    x = model.rows(3, 7)
    assert identical(_output_and_gradient(model.eval(), x.clone()), _output_and_gradient(plain.eval(), x.clone()))


@given(cases(), batch_sizes(4, 1))
def test_a_plain_phase_and_a_paused_forward_are_the_plain_network(case, sizes):
    model = case.model()
    handle = case.attach(model, phases=(rdp.Phase.PLAIN, rdp.Phase.DROP, rdp.Phase.FREEZE))
    for step in range(3):
        x = model.rows(sizes[0], step)
        plain = case.model()
        plain.load_state_dict(model.state_dict())
        expected = _output_and_gradient(plain, x.clone())
        if handle.phase is not rdp.Phase.PLAIN:
            with handle.paused():
                assert identical(_output_and_gradient(model, x.clone()), expected)
        else:
            assert identical(_output_and_gradient(model, x.clone()), expected)
        handle.advance()


def _output_and_gradient(model: torch.nn.Module, x: torch.Tensor) -> tuple:
    seed(5)
    model.zero_grad()
    output = model(x.requires_grad_())
    loss(output).backward()
    return output, x.grad, [p.grad for p in model.parameters()], dict(model.named_buffers())


@given(cases(), batch_sizes(), st.integers(0, 3), st.booleans())
def test_attach_then_remove_restores_the_model_exactly(case, sizes, steps, at_attach):
    model = case.model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("user's"))
    next(model.children()).register_forward_pre_hook(lambda *_: None)
    before, weights = anatomy(model), copy.deepcopy(model.state_dict())

    handle = case.attach(model, example_inputs=model.rows(2, 0) if at_attach else None)
    assert identical(copy.deepcopy(model.state_dict()), weights)
    assert list(model.state_dict()) == list(weights)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(steps):
        for k, size in enumerate(sizes):
            loss(model(model.rows(size, 10 * step + k))).backward()
        optimizer.step()
    optimizer.zero_grad()
    weights = copy.deepcopy(model.state_dict())
    handle.remove()
    handle.remove()

    assert anatomy(model) == before
    assert identical(copy.deepcopy(model.state_dict()), weights)
    plain = case.model()
    plain.load_state_dict(weights)
    calls.clear()
    assert identical(_output_and_gradient(model, model.rows(3, 5)), _output_and_gradient(plain, model.rows(3, 5)))
    assert calls == ["user's"]


@given(cases(), batch_sizes(4, 1))
def test_discovery_at_attach_and_at_the_first_forward_agree_and_touch_nothing(case, sizes):
    model, late = case.model(), case.model()
    for each in (model, late):
        each.body.eval() if hasattr(each, "body") else None  # flags are kept per module
    before, weights = anatomy(model), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    handle = case.attach(model, example_inputs=model.rows(sizes[0], 0))
    assert torch.equal(state, torch.get_rng_state())
    assert identical(copy.deepcopy(model.state_dict()), weights)
    assert all(p.grad is None for p in model.parameters())
    late_handle = case.attach(late)
    assert late_handle.branches == ()
    late(late.rows(sizes[0], 0))
    assert handle.branches == late_handle.branches
    handle.remove()
    assert anatomy(model) == before
