"""`rdp.hooks`: the gate of one module called by hand, its short cuts for rows that are all alike, and its words."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from torch import Tensor, nn

import rdp
from rdp import Phase, passes
from rdp.branches import GatePoint, RowAxis
from rdp.forward import Forward
from rdp.hooks import EntryHook, GateHook, Hook

CASE = Case(BlockMLP, (("plain", "norm"),), rate=0.5, decay="constant", seed=3)


def gate(point: GatePoint, keep_prob: float | None = None) -> GateHook:
    model = CASE.model()
    return GateHook(CASE.attach(model, example_inputs=model.rows(2, 0))._run, 0, point, keep_prob)


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """The result, and its gradient for each input; zeros where there is none."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    result = function(*inputs)
    weights = torch.arange(result.numel(), dtype=result.dtype).view(result.shape) + 1
    if result.requires_grad:
        (result * weights).sum().backward()
    return [result.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("phase", [Phase.DROP, Phase.FREEZE])
@pytest.mark.parametrize(("of_block", "keep_prob"), [(False, None), (False, 0.25), (True, None)])
def test_rows_that_are_all_alike_are_gated_as_each_of_them_is(keep, phase, of_block, keep_prob):
    hook = gate(GatePoint("body.0.fc2", 0, RowAxis(0), of_block=of_block), keep_prob)
    inputs = tuple(torch.randn(2 if of_block else 1, 3, 4, dtype=torch.float64))
    mask = torch.full((3,), keep)

    def whole(x: Tensor, source: Tensor | None = None) -> Tensor:
        return hook._gate_whole(x, source, phase, keep)

    def by_row(x: Tensor, source: Tensor | None = None) -> Tensor:
        return hook._gate_rows(phase, mask, x, source)

    for mine, theirs in zip(value_and_gradients(whole, *inputs), value_and_gradients(by_row, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_dropped_block_returns_its_input_in_the_dtype_of_its_output_and_a_copy_of_it():
    """The model may write into what the block returns, but must not write into what it takes."""
    hook = gate(GatePoint("body.0", 0, RowAxis(0), of_block=True))
    source = torch.randn(3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        out = hook._gate_whole(torch.randn(3, 4, dtype=dtype), source, Phase.DROP, False)
        assert out.dtype == dtype
        assert torch.equal(out, source.to(dtype))
        assert out.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_in_batch_mode_no_row_axis_is_needed(keep, rows):
    hook = gate(GatePoint("body.0.fc2", 0, None))
    x = torch.randn(5, 4)
    out = hook._gate_rows(Phase.DROP, torch.full((rows,), keep), x, None)
    assert torch.equal(out, x if keep else torch.zeros_like(x))


def test_rows_that_do_not_fit_are_told_with_the_module():
    hook = gate(GatePoint("body.0.fc2", 0, RowAxis(1)))
    with pytest.raises(rdp.ForwardError, match=r"the output of `body.0.fc2` has shape \(3, 4\), whose axis 1 should"):
        hook._gate_rows(Phase.DROP, torch.ones(3, dtype=torch.bool), torch.randn(3, 4), None)


class Distributed(nn.Linear):
    """Stands for a layer that returns a DTensor, which has a `_local_tensor`."""

    local = False

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.local:
            out._local_tensor = out
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Distributed(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_an_output_without_rows_of_its_own(mode):
    model, x = Net(), torch.randn(3, 4)
    rdp.attach(model, 0.5, mode=mode, decay="constant", example_inputs=x)
    model.fc.local = True
    if mode == "batch":
        model(x)
        return
    with pytest.raises(rdp.ForwardError) as error:
        model(x)
    assert str(error.value) == (
        "the output of `fc` is a DTensor, whose rows cannot be masked. Attach after parallelize_module and let the "
        "module return a local tensor (use_local_output=True), or use mode='batch'"
    )


def test_a_branch_that_is_called_by_itself_is_told_once():
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    x = model.stem(model.rows(2, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle.paused():
            model.body[0](x)
        with torch.no_grad():
            model.body[0](x)
        model.eval()
        model.body[0](x)
        model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in (model.body[1], model.body[0], model.body[1]):
            block(x)
    assert [(str(w.message), w.category) for w in caught] == [
        (
            "branch `body.1.fc2` ran outside of a forward of the attached model, so it is trained plainly. Call the "
            "BlockMLP itself, not its parts, or attach to the part that is called",
            rdp.RdpWarning,
        )
    ]
    assert handle._run.watch.reached == set()


def test_every_hook_in_the_model_knows_its_run():
    """By which another handle, and `check()`, tell whose it is."""
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    hooks = [
        hook
        for module in model.modules()
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    ]
    assert len(hooks) >= 6
    assert all(isinstance(hook, Hook) and hook.run is handle._run for hook in hooks)


# -- the first module of a branch -------------------------------------------------------------------------------------


class Entered:
    """Stands for a branch that runs on some of the rows; notes what it is entered with."""

    def __init__(self, batch_norm: bool) -> None:
        self.program = SimpleNamespace(batch_norm=batch_norm)
        self.replaying = False
        self.forgot = 0
        self.split: Any = None

    def forget(self) -> None:
        self.forgot += 1

    def enter(self, args: Any, kwargs: Any, split: Any, freeze: bool) -> Any:
        assert args == ("text",)
        assert list(kwargs) == ["x"]
        self.split, self.freeze = split, freeze
        return "some rows"


def entry(forward: Forward | None, batch_norm: bool = False) -> tuple[EntryHook, Entered]:
    on_rows = Entered(batch_norm)
    return EntryHook(SimpleNamespace(current_forward=lambda: forward), 1, on_rows), on_rows


@pytest.mark.parametrize("may_leave_no_graph", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("phase", [Phase.DROP, Phase.FREEZE])
def test_which_forwards_run_on_some_rows(phase, batch_norm, may_leave_no_graph, monkeypatch):
    monkeypatch.setattr(passes, "may_leave_no_graph", lambda run: may_leave_no_graph)
    least = 2 if batch_norm else 1
    for rows in range(1, 7):
        for kept in range(rows + 1):
            masks = torch.stack([torch.ones(rows), torch.arange(rows) < kept, torch.zeros(rows)]).bool()
            hook, on_rows = entry(Forward(phase, masks), batch_norm)
            result = hook(None, ("text",), {"x": torch.zeros(rows)})
            if kept == 0:  # a few rows are run for nothing, so that the others need not
                expected = phase is Phase.DROP and may_leave_no_graph and rows > least
            else:
                expected = kept >= least and rows - kept >= least
            assert result == ("some rows" if expected else None)
            assert on_rows.forgot == 1
            if expected:
                assert on_rows.split.kept.tolist() == list(range(kept))
                assert on_rows.split.dropped.tolist() == list(range(kept, rows))
                assert on_rows.freeze == (phase is Phase.FREEZE)


@pytest.mark.parametrize("forward", [None, Forward(Phase.PLAIN, torch.tensor([[True, False]] * 3))])
def test_plain_forwards_run_on_all_rows(forward):
    hook, on_rows = entry(forward)
    assert hook(None, (torch.zeros(2),), {}) is None
    assert (on_rows.forgot, on_rows.split) == (1, None)


def test_a_replay_is_left_alone():
    hook, on_rows = entry(Forward(Phase.DROP, torch.tensor([[True, False]] * 3)))
    on_rows.replaying = True
    assert hook(None, (torch.zeros(2),), {}) is None
    assert (on_rows.forgot, on_rows.split) == (0, None)


def test_rows_are_cut_before_any_other_hook_sees_them():
    model = CASE.model()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: None)
    CASE.attach(model, example_inputs=model.rows(2, 0))
    in_order = [list(module._forward_pre_hooks.values()) for module in model.body.modules()]
    entered = [hooks for hooks in in_order if any(isinstance(hook, EntryHook) for hook in hooks)]
    assert len(entered) == 2
    assert all(isinstance(hooks[0], EntryHook) for hooks in entered)
