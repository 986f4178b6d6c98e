"""`rdp.run` and the words of the handle: what a step, a closure and another optimizer change, and each message."""

from __future__ import annotations

import contextlib
import re
import warnings

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import loss
from torch import nn
from torch.optim import SGD

import rdp
from rdp import Phase, hooks
from rdp.progress import Progress
from rdp.ranks import Ranks

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def attached(**changes) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    return model, CASE.attach(model, **{"example_inputs": model.rows(2, 0)} | changes)


def forward(model: nn.Module, rows: int = 4, seed: int = 0) -> None:
    loss(model(model.rows(rows, seed))).backward()


@contextlib.contextmanager
def told(*messages: str):
    """Just these warnings, and no others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [(str(w.message), w.category) for w in caught] == [(message, rdp.RdpWarning) for message in messages]


# -- what is told -----------------------------------------------------------------------------------------------------


def test_a_step_without_a_forward_is_told_once():
    model, handle = attached()
    optimizer = handle.wrap(SGD(model.parameters(), lr=0.1))
    with told(
        "the optimizer stepped, but no gated training forward of the attached model came before it: Residual DropPath "
        "had no part in this step. Is the model in eval mode, or was only a part of it called?"
    ):
        optimizer.step()
        optimizer.step()
    assert handle._run.watch.warned == {"idle"}
    assert handle.step_count == 2
    handle.remove()
    with told():
        optimizer.step()


def test_an_optimizer_whose_place_was_taken():
    model, handle = attached()
    old, new = (handle.wrap(kind(model.parameters(), lr=0.1)) for kind in (SGD, torch.optim.Adam))
    assert handle._run.optimizers == [new]
    forward(model)
    with told():
        new.step()
    forward(model)
    with told(
        "this SGD stepped, although the handle has wrapped another optimizer over some of the same parameters since, "
        "which took its place. Give each parameter to one optimizer; where several alternate, step plain ones and call "
        "handle.advance() after each step"
    ):
        old.step()
    assert handle._run.watch.warned == {"replaced"}


def test_warnings_of_a_step_show_the_line_that_called():
    model, handle = attached()
    old, _ = (handle.wrap(kind(model.parameters(), lr=0.1)) for kind in (SGD, torch.optim.Adam))
    with pytest.warns(rdp.RdpWarning) as caught:
        old.step()
    assert [warning.filename for warning in caught] == [__file__] * 2


def test_an_optimizer_of_other_parameters():
    _, handle = attached()
    with pytest.raises(rdp.ArgumentError) as error:
        handle.wrap(SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert str(error.value) == (
        "this SGD holds no parameter of the attached BlockMLP; build it from model.parameters() of the very model that "
        "was attached"
    )
    assert handle._run.optimizers == []


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [("text", "'text'"), (torch.zeros(0, 3), "a tensor of shape (0, 3)"), ({}, "{}"), ((), "()")],
)
def test_inputs_that_cannot_be_called_with(inputs, shown):
    model = CASE.model()
    with pytest.raises(rdp.ArgumentError) as error:
        CASE.attach(model).discover(inputs)
    assert str(error.value) == (
        "example_inputs must be what the model is called with, a tensor, a tuple or a dict of keyword arguments, with "
        f"at least one row; got {shown}"
    )


def test_inputs_that_were_made_in_inference_mode():
    model = CASE.model()
    handle = CASE.attach(model)
    with torch.inference_mode():
        x = model.rows(2, 0).clone()
    with pytest.raises(rdp.ArgumentError) as error:
        handle.discover(x)
    assert str(error.value) == (
        "example_inputs holds a tensor that was made under torch.inference_mode, which cannot be followed through the "
        "model; pass a clone() of it that is made outside"
    )


def test_the_ranks_of_a_state():
    model, handle = attached()
    forward(model)
    state = handle.state_dict()
    assert state["ranks"] == 1
    for damaged in ("one", None):
        with pytest.raises(rdp.StateError) as error:
            attached()[1].load_state_dict(state | {"ranks": damaged})
        assert str(error.value) == f"ranks in the state is damaged or missing: {damaged!r}. Load another one"
    with pytest.raises(rdp.StateError) as error:
        attached()[1].load_state_dict(state | {"ranks": 4})
    assert str(error.value) == (
        "the state was saved by 4 ranks and is loaded by 1, whose rows would be masked otherwise. Resume with 4, or "
        "set state['ranks'] = 1 to accept other masks from here on"
    )
    model, handle = attached(mode="batch")
    handle.load_state_dict(handle.state_dict() | {"ranks": 4})  # all ranks have one mask


def test_a_removed_handle_is_of_no_use():
    model, handle = attached()
    handle.remove()
    for use in (lambda: handle.wrap(SGD(model.parameters(), lr=0.1)), lambda: handle.discover(model.rows(2, 0))):
        with pytest.raises(rdp.AttachError) as error:
            use()
        assert str(error.value) == ("this handle was removed from its BlockMLP; attach again with rdp.attach(model)")


def test_how_a_handle_is_printed():
    model = CASE.model()
    handle = CASE.attach(model)
    head = "ResidualDropPath(BlockMLP, rate=0.6, mode='row'): "
    assert repr(handle) == f"{head}step 0, phase DROP; branches will be found in the first training forward"
    forward(model)
    handle.advance()
    table = [re.sub(" +", " ", line) for line in repr(handle).splitlines()]
    assert table == [
        f"{head}step 1, phase FREEZE",
        "branch rate kind compute parameters note",
        *(f"body.{i}.fc2 0.600 identity rows {4 + 2 * (i == 1)}" for i in range(3)),
    ]
    handle.remove()
    assert repr(handle).startswith(f"{head}removed\nbranch ")


# -- when a step is over ----------------------------------------------------------------------------------------------


def test_a_step_is_over_when_all_optimizers_have_stepped():
    model, handle = attached()
    first, second = (handle.wrap(SGD(part.parameters(), lr=0.1)) for part in (model.body, model.head))
    for step in range(3):
        forward(model, seed=step)
        assert handle.step_count == step
        (first if step % 2 else second).step()
        assert handle.step_count == step
        (second if step % 2 else first).step()
        assert handle.step_count == step + 1
        assert handle._run.traced_phase is handle.phase


def test_one_of_several_that_steps_twice_ends_the_step_too():
    model, handle = attached()
    first, _ = (handle.wrap(SGD(part.parameters(), lr=0.1)) for part in (model.body, model.head))
    forward(model)
    first.step()
    assert handle.step_count == 0
    first.step()
    assert handle.step_count == 1


def test_frozen_parameters_are_those_of_branches_that_no_row_learns_in():
    model, handle = attached(mode="batch")
    seen = set()
    for step in range(8):
        forward(model, seed=step)
        kept = handle.masks[:, 0]
        learns = kept if handle.phase is Phase.DROP else ~kept
        frozen = set(handle.frozen)
        expected = {
            name
            for branch, alive in zip(handle.branches, learns, strict=True)
            if not alive
            for name in branch.parameters
        }
        assert frozen == expected
        seen |= frozen
        handle.advance()
    assert seen == {name for branch in handle.branches for name in branch.parameters}


def test_frozen_parameters_are_those_that_all_ranks_have_agreed_on(monkeypatch):
    model, handle = attached()
    forward(model)
    asked = []
    agreement = handle._run.agreement
    monkeypatch.setattr(agreement, "settle", asked.append)
    handle._run.agree()
    assert [live.tolist() for live in asked] == [handle._run.progress.live().tolist()]
    agreement.live = torch.tensor([True, False, True])
    assert handle.frozen == handle.branches[1].parameters
    agreement.live = torch.tensor([False, True, True])
    assert handle.frozen == handle.branches[0].parameters
    handle.remove()
    handle._run.agree()
    assert len(asked) == 1, "nobody answers any more"


@pytest.mark.filterwarnings("ignore:the optimizer stepped")
def test_who_has_asked_what_is_frozen_says_it_at_the_end_of_the_step(monkeypatch):
    model, handle = attached(mode="batch")
    told: list[frozenset[int]] = []
    monkeypatch.setattr(handle._run.watch, "step_ends", told.append)
    optimizer = handle.wrap(SGD(model.parameters(), lr=0.1))
    for given in (frozenset({1}), frozenset()):
        handle._run.stepped(optimizer, given)
        assert told.pop() == given
    forward(model)
    expected = handle._run.frozen_parameters()
    handle._run.stepped(optimizer, None)
    assert told.pop() == expected


def test_a_closure_forgets_the_forwards_of_its_earlier_calls():
    """Those before it count, but for those whose gradients the optimizer has thrown away since."""
    model, handle = attached()
    run = handle._run
    forward(model)
    position = run.position()
    for seed in (1, 2):
        run.restart_step(position)
        assert run.progress.forwards == 1
        forward(model, seed=seed)
        assert run.progress.forwards == 2
    run.restart_step(position)
    assert run.progress.forwards == 1, "there are gradients still"
    model.zero_grad()
    run.restart_step(position)
    assert run.progress.forwards == 0
    handle.advance()
    model(model.rows(2, 0))  # without a backward so far
    position = run.position()
    run.restart_step(position)
    assert run.progress.forwards == 1


def test_gradients_that_are_thrown_away_take_their_forwards_along():
    model, handle = attached()
    run = handle._run
    forward(model)
    model(model.rows(2, 1))  # whose backward is still to come
    run.forget_finished()
    assert run.progress.forwards == 1
    first, _ = (handle.wrap(SGD(part.parameters(), lr=0.1)) for part in (model.body, model.head))
    forward(model, seed=2)
    first.step()
    run.forget_finished()
    assert run.progress.forwards == 2, "they were used, and the other optimizer will use them"


def test_a_state_that_was_loaded_is_left_behind():
    model, handle = attached()
    forward(model)
    state = handle.state_dict()
    handle.load_state_dict(state)
    forward(model, rows=3, seed=1)
    assert handle.state_dict()["masks"].shape == (3, 3)


def test_what_ranks_must_have_in_common():
    _, handle = attached(seed=5, phases=(Phase.DROP, Phase.FREEZE, Phase.PLAIN))
    handle.advance()
    assert handle._run._facts() == {
        "the step": 1,
        "the branches": ["body.0.fc2", "body.1.fc2", "body.2.fc2"],
        "the rates": [0.6] * 3,
        "the seed": 5,
        "the phases, mode or sampling": ((Phase.DROP, Phase.FREEZE, Phase.PLAIN), "row", "bernoulli"),
    }
    assert handle._run.agreement._facts() == handle._run._facts()
    assert handle.join_device == torch.device("cpu")


def test_pauses_are_counted():
    model, handle = attached()
    with handle.paused():
        with handle.paused():
            pass
        model(model.rows(2, 0))
        assert handle._run.pauses == 1
    assert handle._run.pauses == 0
    assert handle._run.watch.forwards == 0


def test_a_rank_that_was_out_of_data_catches_up():
    _, handle = attached()
    hook = handle.join_hook()
    assert hook._agreement is handle._run.agreement
    assert hook._step_count() == 0
    hook._skip_to(3)
    assert (handle.step_count, handle.phase, hook._step_count()) == (3, Phase.FREEZE, 3)
    assert handle._run.traced_phase is Phase.FREEZE
    hook._skip_to(2)
    assert handle.step_count == 3


def test_parameters_that_a_state_moves_are_no_steps():
    model, handle = attached()
    handle.wrap(SGD(model.parameters(), lr=0.1))
    with told():
        for step in range(3):
            forward(model, seed=step)
            with torch.no_grad():
                model.head.weight.add_(1)
            handle.load_state_dict(handle.state_dict())
        forward(model)
    assert handle.check().problems == ()


def test_between_the_steps_of_several_optimizers_parameters_move_unannounced():
    model, handle = attached()
    optimizers = [handle.wrap(SGD(part.parameters(), lr=0.1)) for part in (model.stem, model.body, model.head)]
    with told():
        for _ in range(2):
            for optimizer in optimizers:
                forward(model)
                optimizer.step()
    assert handle.step_count == 2


def test_a_forward_that_was_interrupted_does_not_count(monkeypatch):
    model, handle = attached()
    x = model.rows(4, 0)

    def interrupt(x):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.body[1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
    masks = handle.masks
    model(x)
    assert handle._run.progress.forwards == 1
    assert torch.equal(handle.masks, masks)


# -- what is passed on ------------------------------------------------------------------------------------------------


def test_the_hook_of_the_model_comes_before_those_that_change_its_inputs():
    model = CASE.model()
    model.register_forward_pre_hook(lambda module, args: None)
    handle = CASE.attach(model)
    assert handle.refused == ()
    assert isinstance(next(iter(model._forward_pre_hooks.values())), hooks.BeginHook)


def test_a_branch_of_rate_0_has_no_hooks_and_the_others_run_on_rows():
    model, handle = attached(decay="linear")
    assert [branch.rate > 0 for branch in handle.branches] == [False, True, True]
    kinds = [
        {type(hook) for module in block.modules() for hook in module._forward_pre_hooks.values()}
        for block in model.body
    ]
    assert kinds[0] == set()
    assert all(hooks.EntryHook in each for each in kinds[1:])
    assert not model.body[0].fc2._forward_hooks


def test_each_rank_draws_masks_of_its_own(monkeypatch):
    model, handle = attached()
    state = handle.state_dict()
    monkeypatch.setattr(Ranks, "rank", 2)
    loaded: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "load_state_dict", lambda self, state, rank: loaded.append(rank))
        handle.load_state_dict(state)
        fresh = CASE.attach(CASE.model())
        fresh.load_state_dict(state)
        fresh.discover(model.rows(2, 0))
    assert loaded == [2, 2, 2]
    _, other = attached()
    model(model.rows(6, 0))
    assert torch.equal(handle.masks, other._run.progress.begin_forward(6, 2))


def test_under_join_ranks_are_told_what_is_live_after_the_forward_was_drawn(monkeypatch):
    model, handle = attached()
    asked = []
    monkeypatch.setattr(handle._run.agreement, "forward_begins", asked.append)
    model(model.rows(4, 0))
    assert [live().tolist() for live in asked] == [handle._run.progress.live().tolist()]


def test_how_a_model_is_split_is_looked_at_before_its_branches(monkeypatch):
    model = CASE.model()
    handle = CASE.attach(model)
    checked = []
    monkeypatch.setattr(rdp.handle, "check_sharding", lambda *arguments: checked.append(arguments))
    handle.discover(model.rows(2, 0))
    assert checked == [(model, handle._run.agreement.ranks)]


def test_a_forward_that_raised_is_over_and_does_not_count(monkeypatch):
    model, handle = attached()

    def fail(x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.body[1], "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(model.rows(4, 0))
    assert handle._run.forwards.running == []
    assert handle._run.progress.forwards == 0


def test_fixed_sampling_drops_as_many_rows_in_every_forward():
    model, handle = attached(sampling="fixed", rate=0.5)
    for seed in range(4):
        model(model.rows(6, seed))
        assert handle.masks.sum(1).tolist() == [3] * 3


@pytest.mark.parametrize("freeze", ["params", "output"])
def test_where_parameters_are_frozen_all_micro_batches_of_a_step_have_one_mask(freeze):
    model, handle = attached(mode="batch", freeze=freeze)
    drawn = set()
    for seed in range(8):
        model(model.rows(2, seed))
        drawn.add(tuple(handle.masks[:, 0].tolist()))
    assert (len(drawn) == 1) == (freeze == "params")
