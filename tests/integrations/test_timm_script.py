"""RDP in the pattern of timm's train.py: factory, loss scaler, clipping, accumulation, EMA, schedule, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from laws.training import identical
from recorder import outcome
from timm_script import Run, main

import rdp

pytestmark = pytest.mark.filterwarnings("error::rdp.RdpWarning")


@pytest.mark.parametrize(("opt", "mode"), [("adamw", "batch"), ("adamw", "row"), ("lamb", "batch")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_script(recorder, tmp_path: Path, opt: str, accumulate: int, mode: str) -> None:
    recorder.arguments = {"mode": mode}
    torch.manual_seed(0)
    run = Run(tmp_path, opt, updates=5, accumulate=accumulate)
    run.train(epochs=2)
    recorder.check(steps=10, accumulate=accumulate, evaluations=2)


def test_the_average_is_a_plain_model_that_follows(recorder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = Run(tmp_path)
    expected = copy.deepcopy(dict(run.model.named_parameters()))
    run.train(epochs=2)
    for number, step in enumerate(recorder.steps):
        for name, (now, _) in step.after.items():
            expected[name].data.lerp_(now, 0.1 if number else 1.0)  # timm copies the model at the first update
    averaged = dict(run.model_ema.module.named_parameters())
    assert averaged.keys() == expected.keys()
    for name, p in averaged.items():
        torch.testing.assert_close(p, expected[name])
    before = run.handle.state_dict()
    run.model_ema.module.train()
    outputs = [run.model_ema.module(torch.ones(2, 1, 28, 28)) for _ in range(2)]
    assert identical(*outputs)
    assert identical(run.handle.state_dict(), before)


@pytest.mark.parametrize("updates", [4, 5])
@pytest.mark.parametrize("checkpoint", ["last.pth.tar", "checkpoint-0.pth.tar"])
def test_resume_from_timms_checkpoint(recorder, tmp_path: Path, updates: int, checkpoint: str) -> None:
    def run(folder: Path, epochs: int, resume: str | None = None) -> tuple:
        torch.manual_seed(0)
        run = Run(folder, updates=updates)
        if resume is not None:
            run.resume(resume)
        run.train(epochs)
        return *outcome(run.handle, run.optimizer), run.model_ema.module.state_dict()

    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
    expected = run(tmp_path / "whole", 2)
    run(tmp_path / "half", 1)
    recorder.arguments = {"seed": 9}  # the masks have to come from the checkpoint
    assert identical(run(tmp_path / "half", 2, checkpoint), expected)
    assert len(recorder.steps) == updates
    assert recorder.steps[0].phase is (rdp.Phase.FREEZE if updates % 2 else rdp.Phase.DROP)


def test_the_example_prints_what_moved(capsys: pytest.CaptureFixture[str]) -> None:
    main(epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[2] for line in lines] == ["DROP", "FREEZE"] * 2
    assert all("." in line.split()[3] for line in lines[1::2])
