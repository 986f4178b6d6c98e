"""What is decided before anything is hooked, where the public functions would decide it later or for another reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws.architectures import BlockMLP
from torch import Tensor, nn

import rdp
from rdp.choose import Choice, check_unattached, choose_branches
from rdp.options import Options

DEFAULTS: dict[str, Any] = {
    "rate": 0.4,
    "mode": "row",
    "decay": "linear",
    "sampling": "bernoulli",
    "freeze": "output",
    "scale_by_keep": False,
    "phases": (rdp.Phase.DROP, rdp.Phase.FREEZE),
    "branches": None,
    "native": "error",
    "compute": "auto",
    "seed": 0,
}


def choose(model: nn.Module, *args: Tensor, **changes: Any) -> Choice:
    return choose_branches(model, Options(**DEFAULTS | changes), args, {})


@pytest.mark.parametrize("part", ["", "body.1"])
@pytest.mark.parametrize("kind", ["_forward_hooks", "_forward_pre_hooks"])
def test_one_hook_of_another_handle_is_enough_to_refuse_a_model(part, kind):
    model = BlockMLP(("plain", "plain"))
    handle = rdp.attach(model.get_submodule(part))
    hooks = getattr(model.get_submodule(part), kind)
    kept = dict(hooks)
    hooks.clear()
    with pytest.raises(rdp.AttachError, match="is attached already"):
        check_unattached(model)
    check_unattached(model, besides=handle._run)
    hooks.update(kept)
    handle.remove()
    check_unattached(model)


class Block(nn.Module):
    def __init__(self, branch: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self, x)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def model() -> nn.Sequential:
    """Branches that can run on rows, that draw random numbers, and that normalise over the batch."""
    return nn.Sequential(
        Block(lambda s, x: s.f(x), f=linear()),
        Block(lambda s, x: s.f(x), f=nn.Sequential(linear(), nn.Dropout(0.1))),
        Block(lambda s, x: s.f(x), f=nn.Sequential(linear(), nn.BatchNorm1d(4))),
    )


@pytest.mark.parametrize(
    ("compute", "on_rows"),
    [("dense", []), ("auto", ["0.f"]), ("rows", ["0.f", "1.f"]), ("ghost", ["0.f", "1.f", "2.f"])],
)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.filterwarnings("error")
def test_branches_have_a_program_where_they_run_on_rows_and_a_note_where_they_could_not(compute, on_rows, mode):
    chosen = choose(model(), torch.randn(3, 4), compute=compute, mode=mode)
    assert [branch.name for branch in chosen.branches] == ["0.f", "1.f", "2.f"]
    assert [branch.rate for branch in chosen.branches] == [0, 0.2, 0.4]
    assert [branch.name for branch in chosen.branches if branch.compute == "rows"] == on_rows == list(chosen.programs)
    notes = ["dense: " in branch.note for branch in chosen.branches]
    assert notes == [compute != "dense" and branch.name not in on_rows for branch in chosen.branches]
    assert chosen.refused == ()


class RowsAreGone(nn.Module):
    """Its branch ends in a tensor that is the same for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.h(x)
        return x + self.g(self.f(x).mean(0, keepdim=True)).expand(len(x), -1)


def test_a_branch_whose_output_has_no_rows_is_for_batch_mode_alone():
    chosen = choose(RowsAreGone(), torch.randn(3, 4))
    assert "left ungated" in chosen.warnings[0]
    assert [branch.name for branch in chosen.branches] == ["h"]
    assert [refusal.name for refusal in chosen.refused] == ["g"]
    assert "no axis that follows the batch; mode='batch' needs none" in str(chosen.refused[0])
    assert [branch.name for branch in choose(RowsAreGone(), torch.randn(3, 4), mode="batch").branches] == ["h", "g"]


class Leaks(RowsAreGone):
    """What d returns is used elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.d = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        d = self.d(x)
        return (x + d) * d.sigmoid()


def test_who_names_a_branch_that_cannot_be_gated_is_told_why_of_that_one():
    with pytest.raises(rdp.BranchError) as error:
        choose(Leaks(), torch.randn(3, 4), branches=["g", "h"])
    assert str(error.value) == (
        "branches names 'g', which returned no tensor in a forward of Leaks and cannot be gated (`g`: its output has "
        "no axis that follows the batch; mode='batch' needs none)"
    )


def test_a_branch_that_is_gated_around_its_block_runs_dense():
    chosen = choose(nn.Sequential(Block(lambda s, x: s.f(x).exp(), f=linear())), torch.randn(3, 4))
    (branch,) = chosen.branches
    assert [gate.of_block for gate in branch.gates] == [True]
    assert branch.note == "dense: it does not end in one module"


class Warm(nn.Linear):
    """Returns something else in training, but row by row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.5 if self.training else 1.0)


def test_branches_are_tried_as_in_training():
    (branch,) = choose(nn.Sequential(Block(lambda s, x: s.f(x), f=Warm(4, 4))), torch.randn(3, 4)).branches
    assert (branch.compute, branch.note) == ("rows", "")
