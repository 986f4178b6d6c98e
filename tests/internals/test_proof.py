"""Each law of the proof, with the rule that keeps it taken away: the proof says which branch breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP, FoldedMLP, LoopMLP
from torch import Tensor, nn

import rdp
from rdp import proof, rows
from rdp.branches import RowAxis
from rdp.training import gates

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
    monkeypatch.setattr("rdp.choose.plan_rows", _without_verification)
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


def test_the_row_axis_that_a_proof_uses_is_seen_on_outputs():
    assert proof._row(torch.arange(6.0), RowAxis(0, 3), 1).tolist() == [3, 4, 5]
