"""RDP in a recipe class as torchtune writes them: accumulation, checkpoints, torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from laws.training import identical
from recorder import outcome
from torchtune_style import Recipe, main

import rdp

pytestmark = pytest.mark.filterwarnings("error::rdp.RdpWarning")


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_recipe(recorder, accumulate: int, mode: str) -> None:
    recorder.arguments = {"mode": mode}
    torch.manual_seed(0)
    recipe = Recipe(batch_size=16, accumulate=accumulate)
    recipe.setup()
    recipe.train(12)
    recorder.check(steps=12, accumulate=accumulate)


def test_compiled_it_learns_the_same(recorder) -> None:
    """A compiled model computes branches whose gradient nobody needs, and the same masks mask them."""
    ends = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        recipe = Recipe(batch_size=16, compile=backend)
        recipe.setup()
        recipe.train(6)
        recorder.check(steps=6, accumulate=2)
        ends.append(([step.masks for step in recorder.steps], list(recipe.model.parameters())))
    assert identical(ends[0][0], ends[1][0])
    torch.testing.assert_close(*(parameters for _, parameters in ends))


@pytest.mark.parametrize("stop_at", [4, 5])
def test_resume_from_its_checkpoint(recorder, tmp_path: Path, stop_at: int) -> None:
    def run(max_steps: int, resume: bool = False) -> Recipe:
        torch.manual_seed(0)
        recipe = Recipe(batch_size=16)
        recipe.setup(torch.load(tmp_path / "half.pt", weights_only=True) if resume else None)
        recipe.train(max_steps)
        return recipe

    whole = run(10)
    run(stop_at).save_checkpoint(tmp_path / "half.pt")
    recorder.arguments = {"seed": 9}  # the masks have to come from the checkpoint
    resumed = run(10, resume=True)
    assert identical(outcome(resumed.rdp, resumed.optimizer), outcome(whole.rdp, whole.optimizer))
    assert len(recorder.steps) == 10 - stop_at
    assert recorder.steps[0].phase is (rdp.Phase.FREEZE if stop_at % 2 else rdp.Phase.DROP)


def test_the_example_prints_what_moved(capsys: pytest.CaptureFixture[str]) -> None:
    main(steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[2] for line in lines] == ["DROP", "FREEZE"] * 2
    assert all("." in line.split()[3] for line in lines[1::2])
