"""Law 1: outputs and all gradients of both phases equal the oracle's; the FREEZE forward is the plain forward."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rdp
from laws.strategies import Case, batch_sizes, cases, every_architecture
from laws.training import Spy, identical, loss, seed

# Rounding: the library may select where the oracle multiplies, and run a branch on some rows only.
TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


def check_steps(case: Case, steps: list[list[int]], learning_rate: float = 0.01) -> None:
    """Train `len(steps)` optimizer steps of micro-batches of the given sizes beside the oracle."""
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model)
    inner = torch.optim.SGD(model.parameters(), lr=learning_rate)
    optimizer, spy = handle.wrap(inner), Spy(inner, model)
    close = TOLERANCES[case.dtype]

    for step, sizes in enumerate(steps):
        phase = handle.phase
        assert phase is [rdp.Phase.DROP, rdp.Phase.FREEZE][step % 2]
        live: set[str] = set()
        for k, size in enumerate(sizes):
            x = model.rows(size, seed=10 * step + k).requires_grad_()
            y = x.detach().clone().requires_grad_()
            seed(k)
            output = model(x)
            seed(k)
            expected = case.oracle(reference, y, handle.masks, phase)
            assert output.dtype == case.dtype
            torch.testing.assert_close(output, expected, **close)
            loss(output).backward()
            loss(expected).backward()
            torch.testing.assert_close(x.grad, y.grad, **close)
            live |= case.live(handle.masks, phase)

        if case.freeze == "output":  # frozen parameters themselves have gradients, which only the wrapper hides
            leaked = [
                name for name, p in model.named_parameters() if name not in live and p.grad is not None and p.grad.any()
            ]
            assert not leaked, "frozen parameters got a gradient"
        optimizer.step()
        assert {name for name, gradient in spy.gradients.items() if gradient is not None} == live
        for name, p in reference.named_parameters():
            if name in live:
                torch.testing.assert_close(
                    spy.gradients[name], p.grad, **close, msg=lambda text, name=name: f"{name}: {text}"
                )
        for (name, actual), (_, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
            torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")

        optimizer.zero_grad()
        reference.zero_grad()
        reference.load_state_dict(model.state_dict())  # rounding must not add up over the steps


STEPS = st.lists(batch_sizes(), min_size=2, max_size=4)


@every_architecture(dropout=False, steps=[[4], [5], [3, 2], [4]])
@given(cases(dropout=False), STEPS)
def test_outputs_and_gradients_of_every_phase_are_the_oracles(case, steps):
    check_steps(case, steps)


@every_architecture(compute="dense", steps=[[4], [5], [3, 2], [4]])
@given(cases(computes=("dense",)), STEPS)
def test_the_dense_path_also_where_branches_use_random_numbers(case, steps):
    check_steps(case, steps)


@given(cases(dropout=False, batch_norm=False, dtypes=(torch.float32, torch.bfloat16)), STEPS)
def test_in_lower_precision(case, steps):
    check_steps(case, steps)


@given(cases(computes=("dense",), scales=(False,)), st.integers(1, 5), st.integers(1, 5))
def test_the_dense_freeze_forward_is_bit_equal_to_the_plain_forward(case, drop_size, freeze_size):
    model = case.model()
    handle = case.attach(model)
    model(model.rows(drop_size, 0))
    handle.advance()
    assert handle.phase is rdp.Phase.FREEZE
    plain = copy.deepcopy(model)
    x = model.rows(freeze_size, 1)
    seed(3)
    output = model(x.clone())
    seed(3)
    assert identical(output.detach(), plain(x.clone()).detach())
    assert identical(dict(model.named_buffers()), dict(plain.named_buffers()))


@given(cases(computes=("dense",), dtypes=(torch.float64, torch.float32)), st.integers(1, 5))
def test_an_undropped_row_is_bit_equal_to_the_plain_forward(case, size):
    """With masks of all ones nothing is multiplied, added or cast: only `scale_by_keep` changes a kept row."""
    model = case.model()
    case.attach(model, rate=1e-12, scale_by_keep=False)
    plain = copy.deepcopy(model)
    x = model.rows(size, 1)
    seed(3)
    output = model(x.clone())
    seed(3)
    assert identical(output.detach(), plain(x.clone()).detach())


@given(cases(), st.integers(1, 4))
def test_branches_name_their_parameters_rates_and_order(case, size):
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(size, 0))
    assert [branch.rate for branch in handle.branches] == pytest.approx(case.rates)
    for n, branch in enumerate(handle.branches):
        assert set(branch.parameters) == {name for name, branches in case.used.items() if n in branches}
        assert branch.name in dict(model.named_modules())
        assert branch.block in dict(model.named_modules())
