"""`rdp.attach` and the handle it returns: phases, masks, choosing branches, pausing, removing."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.architectures import BlockMLP, LoopMLP, ParallelBlock, Transformer
from laws.strategies import Case
from laws.training import anatomy, identical, loss
from torch import Tensor, nn

import rdp
from rdp import Phase, hooks

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def setup(case: Case = CASE, **changes):
    model = case.model()
    return model, case.attach(model, **changes)


# -- phases ----------------------------------------------------------------------------------------------------------


def test_a_new_handle_is_at_the_first_drop_and_knows_nothing_yet():
    model, handle = setup()
    assert isinstance(handle, rdp.ResidualDropPath)
    assert (handle.phase, handle.step_count, handle.branches) == (Phase.DROP, 0, ())
    model(model.rows(2, 0))
    assert [branch.name for branch in handle.branches] == ["body.0.fc2", "body.1.fc2", "body.2.fc2"]
    assert [branch.block for branch in handle.branches] == ["body.0", "body.1", "body.2"]
    assert [branch.kind for branch in handle.branches] == ["identity"] * 3


@pytest.mark.parametrize(
    "phases",
    [
        (Phase.DROP, Phase.FREEZE),
        (Phase.DROP,),
        (Phase.PLAIN,),
        (Phase.PLAIN, Phase.DROP, Phase.FREEZE),
        (Phase.DROP, Phase.FREEZE, Phase.FREEZE),
        (Phase.DROP, Phase.DROP, Phase.FREEZE),
        (Phase.DROP, Phase.PLAIN, Phase.FREEZE),
    ],
)
def test_phases_repeat_and_freeze_replays_the_latest_drop(phases):
    model, handle = setup(phases=phases)
    dropped, seen = None, set()
    for step in range(3 * len(phases)):
        assert (handle.phase, handle.step_count) == (phases[step % len(phases)], step)
        x = model.rows(5, step)
        output = model(x)
        if handle.phase is Phase.DROP:
            dropped = handle.masks.clone()
            seen.add(tuple(dropped.flatten().tolist()))
        elif handle.phase is Phase.FREEZE:
            assert torch.equal(handle.masks, dropped)
        expected = CASE.oracle(CASE.model(), x, handle.masks, handle.phase)
        torch.testing.assert_close(output, expected)
        handle.advance()
    assert len(seen) == 3 * phases.count(Phase.DROP), "every DROP draws anew"


def test_drop_alone_is_timms_drop_path_given_the_same_mask():
    """timm's `drop_path`, with its one random draw replaced by our mask."""

    class TimmBlock(nn.Module):
        def __init__(self, block: nn.Module, rate: float) -> None:
            super().__init__()
            self.block, self.drop_path = block, timm.layers.DropPath(rate)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.block.branch(x))

    model, handle = setup(phases=(Phase.DROP,), scale_by_keep=True)
    twin = CASE.model()
    twin.body = nn.Sequential(*(TimmBlock(block, CASE.rate) for block in twin.body))
    for step in range(3):
        x = model.rows(6, step)
        output = model(x)
        masks = iter(handle.masks)

        def bernoulli_(self: Tensor, _: float, masks=masks) -> Tensor:
            return self.copy_(next(masks).reshape(self.shape))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "bernoulli_", bernoulli_)
            expected = twin(x)
        torch.testing.assert_close(output, expected)
        handle.advance()


def test_scale_by_keep_scales_drop_only():
    """FREEZE has dropped nothing from its forward, so there is nothing to make up for."""
    model, handle = setup(scale_by_keep=True)
    model(model.rows(4, 0))
    handle.advance()
    x = model.rows(4, 1)
    torch.testing.assert_close(model(x), CASE.model()(x))


def test_micro_batches_of_a_step_have_masks_of_their_own():
    model, handle = setup()
    masks = []
    for k in range(4):
        model(model.rows(6, k))
        masks.append(tuple(handle.masks.flatten().tolist()))
    assert len(set(masks)) == 4


def test_batch_mode_gives_all_rows_of_a_branch_one_mask():
    model, handle = setup(mode="batch")
    seen = set()
    for step in range(12):
        model(model.rows(3, step))
        assert handle.masks.shape == (3, 3)
        assert torch.equal(handle.masks, handle.masks[:, :1].expand(3, 3))
        seen.add(tuple(handle.masks[:, 0].tolist()))
        handle.advance()
    assert len(seen) > 2


def test_linear_decay_leaves_the_first_block_alone():
    model, handle = setup(decay="linear")
    model(model.rows(64, 0))
    assert [branch.rate for branch in handle.branches] == [0, 0.3, 0.6]
    assert handle.masks[0].all()
    assert not handle.masks[1].all()


def test_branches_of_one_block_share_a_rate():
    case = Case(Transformer, ("parallel", 3), rate=0.6)
    model, handle = setup(case)
    model(model.rows(2, 0))
    assert [branch.rate for branch in handle.branches] == [0, 0, 0.3, 0.3, 0.6, 0.6]
    assert [branch.kind for branch in handle.branches[:2]] == ["identity", "parallel"]


# -- eval, paused, remove --------------------------------------------------------------------------------------------


def test_eval_forwards_neither_drop_nor_count():
    model, handle = setup()
    twin, twin_handle = setup()
    model.eval()
    model(model.rows(3, 0))
    assert handle.branches == ()
    model.train()
    for step in range(3):
        x = model.rows(4, step)
        assert identical(model(x), twin(x))
        model.eval()(model.rows(7, 1))
        model.train()
        assert torch.equal(handle.masks, twin_handle.masks)
        assert identical(model(x), twin(x))
        handle.advance()
        twin_handle.advance()


def test_paused_is_plain_inside_and_resumes_outside_also_after_an_error():
    model, handle = setup()
    x = model.rows(5, 0)
    plain, dropped = CASE.model()(x), model(x)
    masks = handle.masks
    assert not torch.equal(plain, dropped)

    def interrupted() -> None:
        with handle.paused():
            assert torch.equal(model(x), plain)
            with handle.paused():
                assert torch.equal(model(x), plain)
            assert torch.equal(model(x), plain)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(handle.masks, masks)
    assert not torch.equal(model(x), plain)


def test_the_handle_is_a_context_manager_that_removes_on_exit():
    model = CASE.model()
    before = anatomy(model)

    def interrupted() -> None:
        with CASE.attach(model) as handle:
            assert isinstance(handle, rdp.ResidualDropPath)
            model(model.rows(2, 0))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert anatomy(model) == before
    x = model.rows(5, 0)
    assert torch.equal(model(x), CASE.model()(x))


def test_a_model_can_be_attached_again_after_remove():
    model, handle = setup()
    model(model.rows(2, 0))
    handle.remove()
    again = CASE.attach(model)
    twin, twin_handle = setup()
    x = model.rows(5, 1)
    assert identical(model(x), twin(x))
    assert torch.equal(again.masks, twin_handle.masks)


def test_a_removed_handle_lets_the_model_go():
    model, handle = setup()
    loss(model(model.rows(2, 0))).backward()
    handle.remove()
    alive = weakref.ref(model)
    del model
    handle.remove()
    del handle
    gc.collect()
    assert alive() is None


def test_a_removed_handle_neither_finds_branches_nor_wraps():
    """It would put hooks into a model that it has left, or wrap an optimizer for nothing."""
    model, handle = setup()
    handle.remove()
    before = anatomy(model)
    for use in (
        lambda: handle.discover(model.rows(2, 0)),
        lambda: handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        with pytest.raises(rdp.AttachError, match="this handle was removed from its BlockMLP; attach again"):
            use()
    assert anatomy(model) == before


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_finding_branches_hooks_all_of_them_or_none(monkeypatch, interruption):
    model, handle = setup()
    install = hooks.install

    def fails_at_the_second(run, index, *arguments):
        if index == 1:
            raise interruption
        return install(run, index, *arguments)

    before = anatomy(model)
    monkeypatch.setattr(hooks, "install", fails_at_the_second)
    with pytest.raises(interruption):
        handle.discover(model.rows(2, 0))
    assert (handle.branches, anatomy(model)) == ((), before)
    monkeypatch.undo()
    handle.discover(model.rows(2, 0))
    assert len(handle.branches) == 3
    x = model.rows(4, 0)
    torch.testing.assert_close(model(x), CASE.oracle(CASE.model(), x, handle.masks, Phase.DROP))


def test_two_models_have_two_handles():
    first, first_handle = setup()
    second, second_handle = setup()
    first(first.rows(2, 0))
    first_handle.advance()
    assert (first_handle.phase, second_handle.phase) == (Phase.FREEZE, Phase.DROP)
    x = second.rows(4, 0)
    output = second(x)
    torch.testing.assert_close(output, CASE.oracle(CASE.model(), x, second_handle.masks, Phase.DROP))


def test_the_handle_prints_its_branches():
    model, handle = setup(decay="linear")
    assert "ResidualDropPath" in repr(handle)
    model(model.rows(2, 0))
    assert "DROP; branches will be found in the first training forward" in repr(CASE.attach(CASE.model()))
    text = str(handle)
    for branch in handle.branches:
        assert branch.name in text
        assert f"{branch.rate:.3g}" in text
    assert "DROP" in text
    handle.remove()
    assert "removed" in repr(handle)
    never_used = CASE.attach(CASE.model())
    never_used.remove()
    assert repr(never_used).endswith("removed")


# -- inputs and branches ---------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.body = LoopMLP(2)
        self.body.stem = nn.Identity()

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> Tensor:
        x = self.a(x)
        return self.body(x if other is None else x + self.b(other))


@pytest.mark.parametrize(
    "example",
    [torch.randn(2, 3), (torch.randn(2, 3),), {"x": torch.randn(2, 3), "other": torch.randn(2, 2)}],
    ids=["tensor", "tuple", "dict"],
)
def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(example):
    model = TwoInputs()
    handle = rdp.attach(model, rate=0.1, example_inputs=example)
    assert [branch.name for branch in handle.branches] == ["body.layers.0", "body.layers.1"]


def test_inference_mode_neither_keeps_branches_from_being_found_nor_lasts():
    """A tensor made in it would; it says so, since its versions cannot be followed."""
    model, twin = CASE.model(), CASE.model()
    x = model.rows(4, 0)
    with torch.inference_mode():
        handle = CASE.attach(model, example_inputs=x)
        with pytest.raises(rdp.ArgumentError, match=r"made under torch\.inference_mode.* pass a clone"):
            CASE.attach(twin, example_inputs=(model.rows(2, 0).clone(),))
    assert len(handle.branches) == 3
    loss(model(x)).backward()
    assert model.stem.weight.grad is not None


def test_keyword_inputs_find_branches_at_the_first_forward_too():
    model = TwoInputs()
    handle = rdp.attach(model, rate=0.9, decay="constant", mode="row")
    x, other = torch.randn(5, 3), torch.randn(5, 2)
    output = model(x=x, other=other)
    assert handle.masks.shape == (2, 5)
    handle.remove()
    assert not torch.equal(output, model(x=x, other=other))


def test_a_process_group_of_others_is_refused_as_new_group_returns_it():
    with pytest.raises(rdp.ArgumentError, match="process_group must contain this process; it is of others"):
        rdp.attach(CASE.model(), process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)


def test_branches_by_name_drop_and_no_others():
    model, handle = setup(branches=["body.0.fc2", "body.2.fc2"])
    x = model.rows(6, 0)
    output = model(x)
    assert [branch.name for branch in handle.branches] == ["body.0.fc2", "body.2.fc2"]
    masks = torch.ones(3, 6, dtype=torch.bool)
    masks[[0, 2]] = handle.masks
    torch.testing.assert_close(output, CASE.oracle(CASE.model(), x, masks, Phase.DROP))


def test_branches_by_predicate():
    model, handle = setup(branches=lambda name, module: name.endswith("1.fc2") and isinstance(module, nn.Linear))
    model(model.rows(2, 0))
    assert [branch.name for branch in handle.branches] == ["body.1.fc2"]


def test_remaining_rates_are_those_of_the_whole_model_or_of_the_chosen_branches_but_not_zero_by_accident():
    """A single chosen branch is a single block: it gets the full rate."""
    model, handle = setup(branches=["body.1.fc2"], decay="linear")
    model(model.rows(2, 0))
    assert [branch.rate for branch in handle.branches] == [0.6]


@given(st.integers(1, 6))
def test_branches_found_do_not_depend_on_the_batch_size(batch):
    model, handle = setup()
    model(model.rows(batch, 0))
    other, other_handle = setup()
    other(other.rows(2, 0))
    assert handle.branches == other_handle.branches


# -- state -----------------------------------------------------------------------------------------------------------


def test_the_state_dict_holds_tensors_and_plain_numbers_only():
    model, handle = setup()

    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str, Tensor)

    assert plain(handle.state_dict())
    model(model.rows(2, 0))
    state = handle.state_dict()
    assert plain(state)
    handle.advance()
    model(model.rows(3, 1))
    _, other_handle = setup()
    other_handle.load_state_dict(state)
    assert (other_handle.phase, other_handle.step_count) == (Phase.DROP, 0), "a state dict is a copy, not a view"


def test_a_state_that_waits_for_the_branches_is_a_copy_and_goes_on_with_the_steps():
    first, saved = setup()
    for step in range(2):
        first(first.rows(3, step))
        saved.advance()
    state = saved.state_dict()
    model, handle = setup()
    handle.load_state_dict(state)
    state["replayed"].clear()
    assert identical(handle.state_dict(), saved.state_dict())
    handle.state_dict()["replayed"].append("changed")
    assert identical(handle.state_dict(), saved.state_dict())
    for each in (handle, saved):  # a step without a forward, so that the branches are still unknown
        each.advance()
    later = handle.state_dict()
    assert {key: later[key] for key in ("step_count", "forwards", "replayed")} == {
        key: saved.state_dict()[key] for key in ("step_count", "forwards", "replayed")
    }
    x = model.rows(4, 0)
    assert identical(model(x), first(x))
    assert (handle.step_count, handle.phase) == (3, Phase.FREEZE)
    assert torch.equal(handle.masks, saved.masks)


def test_masks_are_a_copy():
    model, handle = setup()
    model(model.rows(4, 0))
    before = handle.state_dict()["masks"]
    handle.masks.logical_not_()
    assert torch.equal(handle.masks, before)


# -- the loop that forgot the wrapper --------------------------------------------------------------------------------


def test_stepping_the_bare_optimizer_without_advancing_warns_by_name():
    model, _ = setup()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        loss(model(model.rows(2, step))).backward()
        optimizer.step()
    with pytest.warns(rdp.RdpWarning, match=r"advance|wrap"):
        model(model.rows(2, 2))


def test_a_loop_that_advances_by_itself_is_not_warned():
    model, handle = setup()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            loss(model(model.rows(2, step))).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()


def test_neither_gradient_accumulation_nor_the_wrapper_nor_loading_weights_warns():
    model, handle = setup()
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            for k in range(3):
                loss(model(model.rows(2, 3 * step + k))).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_parallel_branches_drop_independently():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), ParallelBlock()).double()
    handle = rdp.attach(model, rate=0.5)
    model(torch.randn(64, 3, 3, dtype=torch.float64))
    assert {tuple(pair) for pair in handle.masks.T.tolist()} == {(a, b) for a in (True, False) for b in (True, False)}
