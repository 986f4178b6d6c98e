"""RDP in an Accelerate loop: accumulation, mixed precision, skipped steps, Accelerate's own checkpoints."""

from __future__ import annotations

import pytest
import torch
from laws.training import identical
from recorder import outcome
from torch.nn.functional import cross_entropy

import rdp

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate_loop import main, train
from digits import digits, small_vit

pytestmark = pytest.mark.filterwarnings("error::rdp.RdpWarning")


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Accelerate keeps its settings in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)


@pytest.mark.parametrize(("precision", "mode"), [("no", "batch"), ("no", "row"), ("bf16", "batch")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_loop(recorder, accumulate: int, precision: str, mode: str) -> None:
    recorder.arguments = {"mode": mode}
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    train(accelerator, batches=12 * accumulate)
    recorder.check(steps=12, accumulate=accumulate, evaluations=3 * accumulate)


def test_an_evaluation_between_the_micro_batches_of_a_step(recorder) -> None:
    train(Accelerator(cpu=True, gradient_accumulation_steps=3), batches=30)
    recorder.check(steps=10, accumulate=3, evaluations=7)


@pytest.mark.parametrize("stop_at", [4, 5])
def test_resume_from_accelerates_checkpoint(recorder, tmp_path, stop_at: int) -> None:
    def run(steps: int, **where) -> tuple:
        torch.manual_seed(0)
        handle = train(Accelerator(cpu=True, gradient_accumulation_steps=2), batches=2 * steps, **where)
        return outcome(handle, recorder.optimizer)

    expected = run(10)
    run(stop_at, save_to=tmp_path)
    recorder.arguments = {"seed": 9}  # the masks have to come from the checkpoint
    assert identical(run(10, resume_from=tmp_path), expected)
    assert len(recorder.steps) == 10 - stop_at
    assert recorder.steps[0].phase is (rdp.Phase.FREEZE if stop_at % 2 else rdp.Phase.DROP)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_steps_skipped_for_inf_leave_phase_and_masks(recorder, clear: str) -> None:
    """Float16 with Accelerate's own scaler; Accelerate allows it on GPUs only, so its optimizer is made by hand."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
    model = small_vit()
    handle = rdp.attach(model, rate=0.5, mode="batch")
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = AcceleratedOptimizer(handle.wrap(inner), scaler=scaler)
    images, labels = digits(16)[:]
    for step in range(12):
        for bad in (True, False) if step % 3 == 1 else (False,):
            before = handle.phase, handle.step_count
            loss = cross_entropy(model(images), labels) * (float("inf") if bad else 1.0)
            scaler.scale(loss).backward()
            optimizer.step()
            assert optimizer.step_was_skipped is bad
            if bad:
                assert (handle.phase, handle.step_count) == before
                skipped = handle.masks
                recorder.forget_forwards()
            elif step % 3 == 1:
                assert identical(handle.masks, skipped), "the step that is tried again has the masks of the skipped one"
            (optimizer if clear == "optimizer" else model).zero_grad()
    recorder.check(steps=12)


def test_wrapping_what_prepare_returned_is_refused() -> None:
    model = small_vit()
    handle = rdp.attach(model)
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(rdp.ArgumentError, match="prepare"):
        handle.wrap(optimizer)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_example_prints_what_moved(capsys: pytest.CaptureFixture[str], precision: str) -> None:
    main(steps=4, precision=precision)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[2] for line in lines] == ["DROP", "FREEZE"] * 2
    assert all("." in line.split()[3] for line in lines[1::2])
