"""The hooks in a model: which there are and in which order, whose they are, and which forwards run on some rows."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from torch import Tensor, nn

import rdp
from rdp import Phase
from rdp.copies import Hook
from rdp.training.gate_hooks import EntryHook, GateHook, LaterHook
from rdp.training.run_hook import RunHook
from rdp.training.step import Draw, Forward
from rdp.training.switches import Switch

CASE = Case(BlockMLP, (("plain", "norm"),), rate=0.5, decay="constant", seed=3)


def attached(model: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model() if model is None else model
    return model, CASE.attach(model, **{"example_inputs": model.rows(2, 0)} | changes)


def hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


# -- what is installed ------------------------------------------------------------------------------------------------


def test_every_hook_in_the_model_knows_its_run():
    """By which another handle, and `check()`, tell whose it is."""
    model, handle = attached()
    hooks = [hook for module in model.modules() for hook in hooks_of(module)]
    assert len(hooks) == 2 + 2 * 2 + 3, "of the model, at both ends of each branch, and at what lies in between"
    assert all(isinstance(hook, Hook) and hook.owner is handle._run for hook in hooks)


def test_a_branch_of_rate_0_has_no_hooks_and_the_others_run_on_rows():
    model, handle = attached(decay="linear")
    assert [branch.rate for branch in handle.branches] == [0, 0.5]
    kinds = [{type(hook) for module in block.modules() for hook in hooks_of(module)} for block in model.body]
    assert kinds == [set(), {EntryHook, LaterHook, GateHook}]


def test_a_dense_branch_has_a_gate_and_no_other_hook():
    model, _ = attached(compute="dense")
    assert {type(hook) for module in model.body.modules() for hook in hooks_of(module)} == {GateHook}


def test_our_hooks_come_before_those_that_change_what_a_module_gets():
    """Masks are decided, and rows are cut, before anything else sees them."""
    model = CASE.model()

    def hook(module: nn.Module, args: Any) -> None: ...

    hook.__module__ = "torch.nn.utils"  # with one of the user's the branches would run dense
    for module in model.modules():
        module.register_forward_pre_hook(hook)
    attached(model)
    first = [next(iter(module._forward_pre_hooks.values())) for module in model.modules()]
    assert isinstance(first[0], RunHook)
    assert sum(isinstance(hook, EntryHook) for hook in first) == 2


# -- the first module of a branch -------------------------------------------------------------------------------------


class OnRows:
    """Stands for a branch that runs on some of the rows; notes what it is entered with."""

    def __init__(self, batch_norm: bool, fewest: int = 0) -> None:
        self.program = SimpleNamespace(batch_norm=batch_norm, fewest=fewest)
        self.replaying = False
        self.passing: Any = "left behind"
        self.entered: Any = None

    def enter(self, given: Any, split_on: Any, freeze: bool) -> str:
        self.entered = given, split_on(torch.device("cpu")), freeze
        return "some rows"

    def later(self, name: str, given: Any) -> Any:
        return name, given


def run(forward: Forward | None, may_leave_no_graph: bool = True) -> Any:
    """Stands for a run in which `forward` is running; of several ranks none leaves a branch out of the graph."""
    return SimpleNamespace(
        calls=SimpleNamespace(running=[forward]),
        model=nn.Identity(),
        options=SimpleNamespace(mode="row"),
        several=not may_leave_no_graph,
        switches=defaultdict(Switch),
    )


def forward(phase: Phase, rows: int, kept: int) -> Forward:
    """Branch 1 keeps the first `kept` rows."""
    masks = torch.stack([torch.ones(rows), torch.arange(rows) < kept, torch.zeros(rows)]).bool()
    return Forward(phase, 0, Draw(0, rows), masks, masks.any(1))


@pytest.mark.parametrize("may_leave_no_graph", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("phase", [Phase.DROP, Phase.FREEZE])
def test_which_forwards_run_on_some_rows(phase, batch_norm, may_leave_no_graph):
    least = 2 if batch_norm else 1
    for rows in range(1, 7):
        for kept in range(rows + 1):
            on_rows = OnRows(batch_norm)
            hook = EntryHook(run(forward(phase, rows, kept), may_leave_no_graph), 1, on_rows)
            result = hook(nn.Identity(), ("text",), {"x": 1})
            if kept == 0:  # a few rows are run for nothing, so that the others need not
                expected = phase is Phase.DROP and may_leave_no_graph and rows > least
            else:
                expected = kept >= least and rows - kept >= least
            assert result == ("some rows" if expected else None)
            assert on_rows.passing is None
            if expected:
                given, split, freeze = on_rows.entered
                assert given == (("text",), {"x": 1})
                assert split.kept.tolist() == list(range(kept))
                assert split.dropped.tolist() == list(range(kept, rows))
                assert freeze == (phase is Phase.FREEZE)


@pytest.mark.parametrize(("given", "enters"), [(None, [False, True, True]), (torch.ones(3, 4), [True] * 3)])
def test_with_too_few_rows_to_gain_all_run_unless_it_is_proved(given, enters):
    entered = []
    for rows in (4, 5, 6):
        here = run(forward(Phase.DROP, rows, 2))
        here.step = SimpleNamespace(given=given)
        entered.append(EntryHook(here, 1, OnRows(False, fewest=5))(nn.Identity(), (1,), {}) is not None)
    assert entered == enters


@pytest.mark.parametrize("phase", [None, Phase.PLAIN])
def test_plain_forwards_run_on_all_rows_and_forget_what_an_interrupted_one_has_left(phase):
    on_rows = OnRows(batch_norm=False)
    assert EntryHook(run(forward(phase, 4, 2) if phase else None), 1, on_rows)(nn.Identity(), (1,), {}) is None
    assert (on_rows.passing, on_rows.entered) == (None, None)


@pytest.mark.parametrize("kind", ["entry", "later", "gate"])
def test_a_replay_is_left_alone(kind):
    on_rows = OnRows(batch_norm=False)
    on_rows.replaying = True
    here = run(forward(Phase.DROP, 4, 2))
    hook = {
        "entry": lambda: EntryHook(here, 1, on_rows),
        "later": lambda: LaterHook(here, "fc", on_rows),
        "gate": lambda: GateHook(here, 1, SimpleNamespace(), on_rows),
    }[kind]()
    assert hook(nn.Identity(), (torch.zeros(4),), {}) is None
    assert (on_rows.passing, on_rows.entered) == ("left behind", None)


def test_a_later_module_is_cut_in_a_forward_that_has_entered_the_branch_and_in_no_other():
    for current, passing, cut in [
        (forward(Phase.DROP, 4, 2), "entered", True),
        (forward(Phase.DROP, 4, 2), None, False),
        (None, "left from a forward that raised", False),
    ]:
        on_rows = OnRows(batch_norm=False)
        on_rows.passing = passing
        result = LaterHook(run(current), "fc", on_rows)(nn.Identity(), (1,), {})
        assert result == (("fc", ((1,), {})) if cut else None)


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_that_was_passed_has_been_reached():
    model, handle = attached()
    watch = handle._run.watch
    for pause in (handle.paused(), torch.no_grad()):
        with pause:
            model(model.rows(4, 0))
    assert watch.reached == set()
    model(model.rows(4, 0))
    assert watch.reached == {0, 1}


class Returns(nn.Module):
    """A block whose branch returns its tensor in a container, beside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Two()

    def rows(self, count: int, seed: int) -> Tensor:
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)["y"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"other": x + 1, "y": self.fc(x) @ torch.eye(4)}


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_in_a_container_the_tensor_of_the_branch_is_gated_and_no_other(mode):
    model, handle = attached(Returns(), mode=mode, compute="dense")
    assert [(point.module, point.leaf) for point in handle.branches[0].gates] == [("branch", 1)]
    returned: list[dict[str, Tensor]] = []
    model.branch.register_forward_hook(lambda module, args, output: returned.append(output))
    seen = set()
    for step in range(8):
        x = model.rows(3, step)
        model(x)
        keep, (output,) = handle.masks[0], returned
        assert torch.equal(output["other"], x + 1)
        dropped = ~keep if handle.phase is Phase.DROP else torch.zeros_like(keep)
        assert torch.equal(output["y"], model.branch.fc(x).masked_fill(dropped[:, None], 0))
        seen.add((handle.phase, *keep.tolist()))
        returned.clear()
        handle.advance()
    assert len(seen) > 2
