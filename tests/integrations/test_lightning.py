"""RDP in Lightning: automatic and manual optimization, accumulation, validation between, resume."""

from __future__ import annotations

import pytest
import torch
from laws.training import identical
from recorder import outcome
from torch.utils.data import DataLoader

import rdp

L = pytest.importorskip("lightning")

from digits import digits  # noqa: E402
from lightning_module import Digits, main  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning", "error::rdp.RdpWarning")


def fit(module: L.LightningModule, batches: int, epochs: int = 1, ckpt_path=None, **arguments) -> L.Trainer:
    """Train on `batches` batches of digits an epoch, with a validation after every three.

    After every four under manual optimization: Lightning clears the gradients before it validates, also those that a
    manual loop is accumulating.
    """
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        val_check_interval=3 if module.automatic_optimization else 4,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    data = DataLoader(digits(16 * batches), batch_size=16), DataLoader(digits(16), batch_size=16)
    trainer.fit(module, *data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("precision", "mode"), [("32-true", "batch"), ("32-true", "row"), ("bf16-mixed", "batch")])
def test_any_optimization(recorder, manual: bool, accumulate: int, precision: str, mode: str) -> None:
    recorder.arguments = {"mode": mode}
    L.seed_everything(0, verbose=False)
    arguments = {} if manual else {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    fit(Digits(manual, accumulate), 12 * accumulate, precision=precision, **arguments)
    recorder.check(steps=12, accumulate=accumulate, evaluations=3 * accumulate)


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("manual", [False, True])
def test_resume_from_lightnings_checkpoint(recorder, tmp_path, manual: bool, steps: int) -> None:
    """`steps` is of an epoch: one whose number is odd ends between DROP and FREEZE."""
    arguments = {} if manual else {"accumulate_grad_batches": 2}

    def run(epochs: int, ckpt_path=None):
        L.seed_everything(0, verbose=False)
        module = Digits(manual)
        return module.handle, fit(module, 2 * steps, epochs=epochs, ckpt_path=ckpt_path, **arguments)

    handle, trainer = run(epochs=2)
    expected = outcome(handle, trainer.optimizers[0])

    _, trainer = run(epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["rdp"]["step_count"] == steps
    recorder.arguments = {"seed": 9}  # the masks have to come from the checkpoint
    handle, trainer = run(epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert len(recorder.steps) == steps
    assert recorder.steps[0].phase is (rdp.Phase.FREEZE if steps % 2 else rdp.Phase.DROP)
    assert identical(outcome(handle, trainer.optimizers[0]), expected)


def test_a_second_fit_goes_on_alternating(recorder) -> None:
    """`configure_optimizers` is called again, so the model gets another wrapped optimizer."""
    L.seed_everything(0, verbose=False)
    module = Digits()
    for _ in range(2):
        fit(module, 6)
    recorder.check(steps=12)


@pytest.mark.parametrize("manual", [False, True])
def test_the_example_prints_what_moved(capsys: pytest.CaptureFixture[str], manual: bool) -> None:
    main(steps=4, manual=manual)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[2] for line in lines] == ["DROP", "FREEZE"] * 2
    assert all("." in line.split()[3] for line in lines[1::2])
