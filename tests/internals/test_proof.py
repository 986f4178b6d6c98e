"""Each law of the proof, with the rule that keeps it taken away: the proof says which branch breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import test_conditioned, test_folded, test_side_outputs
from laws.architectures import BlockMLP, FoldedMLP, LoopMLP
from torch import Tensor, nn

import rdp
from rdp import proof, rows
from rdp.discovery import candidates
from rdp.rows import operations, places
from rdp.rows.axes import Coupling
from rdp.training import gate_hooks, gates, hooks

KINDS = ("plain", "plain", "plain")
MODES = pytest.mark.parametrize("mode", ["row", "batch"])
MODELS = pytest.mark.parametrize("build", [lambda: BlockMLP(KINDS), lambda: FoldedMLP(3), lambda: LoopMLP(3)])


def attached(build: Any, **arguments: Any) -> tuple[nn.Module, rdp.ResidualDropPath]:
    torch.manual_seed(0)
    model = build()
    given = {"decay": "constant", "verify": False, "example_inputs": model.rows(3, 0)} | arguments
    return model, rdp.attach(model, 0.5, **given)


def violations(model: Any, handle: rdp.ResidualDropPath) -> dict[str, str]:
    return dict(proof.prove(handle._run, ((model.rows(3, 0),), {})).violations)


@MODES
@MODELS
def test_nothing_is_wrong_where_nothing_was_taken_away(build, mode):
    assert violations(*attached(build, mode=mode)) == {}


@MODES
@MODELS
def test_a_detach_that_is_missing_is_seen(build, mode, monkeypatch):
    model, handle = attached(build, mode=mode, compute="dense")
    undropped = gates.undropped
    monkeypatch.setattr(gates, "undropped", lambda phase, x, *more: undropped(rdp.Phase.DROP, x, *more))
    found = violations(model, handle)
    assert found.keys() == {branch.name for branch in handle.branches}
    assert all("learns by a way around the gate" in why for why in found.values())


@MODELS
def test_a_value_that_freeze_changes_is_seen(build, monkeypatch):
    model, handle = attached(build)
    assert any(branch.compute == "rows" for branch in handle.branches)
    replay = rows.branch.BranchOnRows.replay

    def wrong(self: Any, *given: Any) -> dict[int, Tensor]:
        return {value: 1.1 * x for value, x in replay(self, *given).items()}

    monkeypatch.setattr(rows.branch.BranchOnRows, "replay", wrong)
    found = violations(model, handle)
    assert found == {b.name: "in FREEZE the output is not that of the plain network" for b in handle.branches}


def test_a_mask_on_another_row_is_seen_and_told_apart(monkeypatch):
    model, handle = attached(lambda: FoldedMLP(3), compute="dense")
    broadcast_rows = gates.broadcast_rows

    def wrong(keep: Tensor, x: Tensor, point: Any) -> Tensor:
        if point.module.startswith("body.1"):
            return keep.repeat(len(x) // len(keep))[:, None]  # as if views were folded, and not tokens
        return broadcast_rows(keep, x, point)

    monkeypatch.setattr(gates, "broadcast_rows", wrong)
    found = violations(model, handle)
    assert list(found.values()) == ["its mask for one row changes another row"]
    assert next(iter(found)).startswith("body.1")


@MODES
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_in_eval_mode_that_is_dropped_is_seen(part, mode):
    model, handle = attached(lambda: BlockMLP(KINDS), mode=mode, compute="dense")
    model.body[part].eval()
    assert violations(model, handle) == {}
    handle._run.blocks = [nn.Identity() for _ in handle.branches]
    assert violations(model, handle) == {f"body.{part}.fc2": "it does not train, but is dropped"}


def test_a_wrong_account_of_what_lies_inside_what_is_seen():
    model, handle = attached(lambda: BlockMLP(KINDS), mode="batch")
    run = handle._run
    run.branches = tuple(replace(b, inside=(i + 1,) if i < 2 else ()) for i, b in enumerate(run.branches))
    run.found(run.branches)
    found = violations(model, handle)
    assert found
    assert all("learns by a way around the gate" in why for why in found.values())


def test_what_breaks_a_law_on_rows_runs_dense_and_what_breaks_it_dense_is_refused(monkeypatch):
    replay = rows.branch.BranchOnRows.replay

    def wrong(self: Any, *given: Any) -> dict[int, Tensor]:
        factor = 1.1 if self.program.entry.startswith("body.1") else 1.0
        return {value: factor * x for value, x in replay(self, *given).items()}

    model = BlockMLP(KINDS)
    monkeypatch.setattr("rdp.look.plan_rows", _without_verification)
    monkeypatch.setattr(rows.branch.BranchOnRows, "replay", wrong)
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(3, 0))
    assert [branch.compute for branch in handle.branches] == ["rows", "dense", "rows"]
    assert handle.branches[1].note == "dense: in FREEZE the output is not that of the plain network"
    assert str(handle).endswith("proved on two rows of the input")
    handle.remove()

    undropped = gates.undropped

    def scaled(phase: rdp.Phase, x: Tensor, *more: Any) -> Tensor:
        return undropped(phase, x, *more) * (1.1 if phase is rdp.Phase.FREEZE else 1.0)

    monkeypatch.setattr(gates, "undropped", scaled)
    with pytest.raises(rdp.BranchError, match="in FREEZE the output is not that of the plain network"):
        rdp.attach(model, 0.5, decay="constant", compute="dense", example_inputs=model.rows(3, 0))
    # What the user has named stays, and check() says what is wrong.
    handle = rdp.attach(model, 0.5, compute="dense", branches=["body.1.fc2"], example_inputs=model.rows(3, 0))
    assert "branch `body.1.fc2`: in FREEZE the output is not that of the plain network" in handle.check().problems


def _without_verification(*given: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.plan, "verify_programs", lambda *_: {})
        return rows.plan.plan_rows(*given)


# -- mended rules of other rooms, taken away ---------------------------------------------------------------------------


def refused(model: nn.Module, inputs: Any, **arguments: Any) -> list[str]:
    """What the proof finds wrong with a model as it is attached to."""
    given = {"decay": "constant", "verify": False, "example_inputs": inputs} | arguments
    with rdp.attach(model, 0.5, **given) as handle:
        found = proof.prove(handle._run, (inputs if isinstance(inputs, tuple) else (inputs,), {}))
    return [*found.violations.values()]


CONDITIONED = [
    test_conditioned.ModuleGate,
    test_conditioned.AdaLNZero,
    test_conditioned.GivenGate,
    test_conditioned.TwoFactors,
]


@MODES
@pytest.mark.parametrize("block", CONDITIONED)
def test_a_gate_from_outside_that_is_not_cut(block, mode, monkeypatch):
    torch.manual_seed(0)
    model, inputs = test_conditioned.Net(block).double(), test_conditioned.batch(2)
    assert refused(model, inputs, mode=mode) == []
    monkeypatch.setattr(candidates, "find_cuts", lambda *_: [])
    found = refused(model, inputs, mode=mode)
    assert len(found) == 2 * block.sums
    assert all("learns by a way around the gate" in why for why in found)


@pytest.mark.parametrize(
    "net", [test_side_outputs.Gate, test_side_outputs.OnTheShortcut, test_side_outputs.ForTheNextBlock]
)
def test_a_side_output_of_some_rows(net, monkeypatch):
    torch.manual_seed(0)
    model, inputs = net(), (torch.randn(2, test_side_outputs.WIDTH), torch.randn(2, test_side_outputs.WIDTH))
    assert refused(model, inputs) == []
    monkeypatch.setattr(operations, "_side_outputs", lambda *_: [])
    monkeypatch.setattr(rows.plan, "verify_programs", lambda *_: {})
    handle = rdp.attach(model, 0.5, decay="constant", verify=False, example_inputs=inputs)
    assert any(branch.compute == "rows" for branch in handle.branches)
    handle.remove()
    # Either the value is wrong, or there are too few rows for what takes the side output.
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=inputs)
    assert any("in FREEZE the output" in b.note for b in handle.branches) or "raised" in str(handle).splitlines()[-1]


@pytest.mark.parametrize("folding", [test_folded.Views, test_folded.FramesOutside, test_folded.ViewsOfFrames])
def test_an_order_of_entries_that_is_another(folding, monkeypatch):
    torch.manual_seed(0)
    model, x = folding(), torch.randn(2, test_folded.FRAMES, test_folded.WIDTH)
    assert refused(model, x) == []
    monkeypatch.setattr(places, "settle", lambda *_: ({}, Coupling()))
    assert refused(model, x) == ["its mask for one row changes another row"] * 3


class Coupled(LoopMLP):
    """The branches take the mean of all rows away."""

    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x - x.mean(0)

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.layers = nn.ModuleList(self.Centred(*f) for f in self.layers)


class Ranked(Coupled):
    """The branches compare rows."""

    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(0)


class Standardized(Coupled):
    """A normalisation over all rows that is none of torch's."""

    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x / (x.square().mean() + 1).sqrt()


@pytest.mark.filterwarnings("ignore::rdp.RdpWarning")
@pytest.mark.parametrize("build", [Coupled, Ranked, Standardized])
def test_coupled_rows_that_are_run_apart(build, monkeypatch):
    torch.manual_seed(0)
    model = build(3)
    assert refused(model, model.rows(2, 0)) == []
    monkeypatch.setattr(rows.plan, "verify_programs", lambda *_: {})
    assert refused(model, model.rows(2, 0)) == ["in FREEZE the output is not that of the plain network"] * 3


class Frozen(BlockMLP):
    """Its first blocks run without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body[:2](self.stem(x))
        return self.head(self.body[2:](x))


@MODES
def test_a_part_without_gradients_that_is_dropped(mode, monkeypatch):
    torch.manual_seed(0)
    model = Frozen(KINDS)
    assert refused(model, model.rows(2, 0), mode=mode, compute="dense") == []
    monkeypatch.setattr(gate_hooks, "is_plain", lambda *_: False)
    with rdp.attach(
        model, 0.5, decay="constant", mode=mode, compute="dense", example_inputs=model.rows(2, 0)
    ) as handle:
        run = handle._run
        gated = tuple(replace(b, share=1.0) for b in run.branches)
        installed = [hook for i, b in enumerate(gated) for hook in hooks.install(run, i, b, None)]
        run.found(gated)
        found = proof.prove(run, ((model.rows(2, 0),), {})).violations
        assert "it does not train, but is dropped" in found.values()
        for hook in installed:
            hook.remove()
