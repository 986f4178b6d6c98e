"""What the examples share: as many steps as there are digits, and no silent end before."""

from __future__ import annotations

import accelerate_loop
import hf_trainer
import lightning_module
import pytest
import timm_script
import torchtune_style
from digits import BATCHES, digits


@pytest.mark.parametrize("example", [accelerate_loop, hf_trainer, lightning_module, torchtune_style])
@pytest.mark.parametrize("steps", [-1, 0, 17])
def test_steps_that_the_digits_do_not_have_are_refused(example, steps: int) -> None:
    with pytest.raises(SystemExit, match=f"--steps must be from 1 to 16, one pass over the digits; got {steps}"):
        example.main(steps)


def test_no_epochs_are_refused() -> None:
    with pytest.raises(SystemExit, match="--epochs must be at least 1; got 0"):
        timm_script.main(epochs=0)


def test_one_pass_is_that_many_batches() -> None:
    assert len(digits(1024)) == 32 * BATCHES


def test_the_last_step_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    torchtune_style.main(16)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(steps) == 16
