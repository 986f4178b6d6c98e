"""The oracle against itself: without it being right, no law says anything."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.masks import splitmix
from laws.oracle import branch_rates, branches_of_parameters, live_parameters, oracle_forward
from laws.strategies import Case, batch_sizes, cases
from laws.training import loss


def forward(case: Case, model, x, masks, phase, **changes):
    torch.manual_seed(0)
    options = {"rates": case.rates, "freeze": case.freeze, "scale_by_keep": False} | changes
    return oracle_forward(model, x, masks, phase, **options)


def draw_masks(case: Case, model, batch: int) -> torch.Tensor:
    shape = (len(model.blocks), batch if case.mode == "row" else 1)
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed)) < 0.5
    masks[[rate == 0 for rate in case.rates]] = True
    return masks.expand(-1, batch).clone()


@given(cases(), st.integers(1, 5))
def test_without_a_dropped_row_both_phases_are_the_plain_forward(case, batch):
    model = case.model()
    x = model.rows(batch, 0)
    torch.manual_seed(0)
    plain = model(x.clone())
    ones = torch.ones(len(model.blocks), batch, dtype=torch.bool)
    for phase in ("DROP", "FREEZE", "PLAIN"):
        torch.testing.assert_close(forward(case, model, x, ones, phase), plain, rtol=1e-12, atol=1e-12)


@given(cases(), st.integers(1, 5))
def test_freeze_computes_the_plain_forward_whatever_the_mask(case, batch):
    model = case.model()
    x, masks = model.rows(batch, 0), draw_masks(case, model, batch)
    torch.manual_seed(0)
    plain = model(x.clone())
    torch.testing.assert_close(forward(case, model, x, masks, "FREEZE"), plain, rtol=1e-12, atol=1e-12)


@given(cases(), st.integers(1, 5), st.sampled_from(["DROP", "FREEZE"]))
def test_exactly_the_live_parameters_get_a_gradient(case, batch, phase):
    model = case.model()
    x, masks = model.rows(batch, 0), draw_masks(case, model, batch)
    live = live_parameters(branches_of_parameters(model, x), masks, phase, case.rates)
    loss(forward(case, model, x, masks, phase)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert moved <= live
    # a stem that every path starts with, and a head that every path ends in, can only be live
    assert live >= {name for name, _ in model.named_parameters() if name.startswith(("stem", "head", "fc", "embed"))}


@given(cases(batch_norm=False, dropout=False), st.integers(2, 5), st.data())
def test_a_mask_on_one_row_changes_no_other_row(case, batch, data):
    model = case.model()
    x = model.rows(batch, 0)
    ones = torch.ones(len(model.blocks), batch, dtype=torch.bool)
    masks = ones.clone()
    masks[data.draw(st.integers(0, len(masks) - 1)), 0] = False
    one_dropped, plain = forward(case, model, x, masks, "DROP"), forward(case, model, x, ones, "DROP")
    torch.testing.assert_close(one_dropped[1:], plain[1:], rtol=1e-12, atol=1e-12)


@given(cases(batch_norm=False, dropout=False), batch_sizes())
def test_gradcheck_of_a_drop_forward(case, sizes):
    model = case.model()
    x = model.rows(min(sizes), 0)[..., :3].requires_grad_()
    masks = draw_masks(case, model, min(sizes))
    assert torch.autograd.gradcheck(
        lambda x: forward(case, model, x, masks, "DROP", freeze="output"), x, fast_mode=True
    )


def test_the_stop_gradient_of_freeze_by_hand():
    """y = x + f(x), f(x) = w x, one row dropped and one kept: only the dropped row's input reaches w."""
    from laws.architectures import BlockMLP

    model = BlockMLP(("plain",)).double()
    x = model.rows(2, 0)
    masks = torch.tensor([[True, False]])
    weight = model.body[0].fc2.bias
    out = oracle_forward(model, x, masks, "FREEZE", [0.5])
    expected = model.head.weight[0]
    (gradient,) = torch.autograd.grad(out[0, 0], weight, retain_graph=True, allow_unused=True, materialize_grads=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(out[1, 0], weight, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    out = oracle_forward(model, x, masks, "DROP", [0.5], scale_by_keep=True)
    (gradient,) = torch.autograd.grad(out[0, 0], weight)
    torch.testing.assert_close(gradient, 2 * expected)


def test_rates_by_hand():
    assert branch_rates([0, 0, 1, 1, 2, 2], 0.2, "linear") == [0, 0, 0.1, 0.1, 0.2, 0.2]
    assert branch_rates([0, 0], 0.2, "linear") == [0.2, 0.2]
    assert branch_rates([0, 1], 0.2, "constant") == [0.2, 0.2]


def test_splitmix_gives_the_published_answers():
    """Those that its authors' implementation in C prints for this seed."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix(1234567, number) for number in range(4)] == expected
