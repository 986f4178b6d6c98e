"""RDP in the Hugging Face Trainer: accumulation, evaluation, its schedule, its checkpoints, smaller last batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from laws.training import identical
from recorder import outcome

import rdp

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from hf_trainer import main, make_trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::rdp.RdpWarning")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("bf16", "mode"), [(False, "batch"), (False, "row"), (True, "batch")])
def test_any_training(recorder, tmp_path: Path, accumulate: int, bf16: bool, mode: str) -> None:
    recorder.arguments = {"mode": mode}
    trainer = make_trainer(str(tmp_path), 12, accumulate, save_strategy="no", bf16=bf16)
    schedule = trainer.create_scheduler(12)
    trainer.train()
    recorder.check(steps=12, accumulate=accumulate, evaluations=6)
    assert schedule.optimizer is trainer.optimizer.optimizer  # the wrapped one, inside Accelerate's


@pytest.mark.parametrize("stop_at", [4, 5])
def test_resume_from_the_trainers_checkpoint(recorder, tmp_path: Path, stop_at: int) -> None:
    def run(resume: bool | str = False) -> tuple:
        torch.manual_seed(0)
        trainer = make_trainer(str(tmp_path), 10, save_strategy="steps", save_steps=stop_at, seed=3)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(recorder.handle, trainer.optimizer.optimizer)

    expected = run()
    recorder.arguments = {"seed": 9}  # the masks have to come from the checkpoint
    assert identical(run(resume=str(tmp_path / f"checkpoint-{stop_at}")), expected)
    assert len(recorder.steps) == 10 - stop_at
    assert recorder.steps[0].phase is (rdp.Phase.FREEZE if stop_at % 2 else rdp.Phase.DROP)


def test_a_bert_with_attention_masks_and_a_last_batch_that_is_smaller(recorder, tmp_path: Path) -> None:
    """A FREEZE step whose batch is smaller than that of its DROP step, and row masks."""
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    handle = rdp.attach(model, rate=0.5)
    optimizer = handle.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))
    texts = [
        {
            "input_ids": torch.randint(32, (9,)),
            "attention_mask": (torch.arange(9) < 3 + n % 7).long(),
            "labels": torch.tensor(n % 2),
        }
        for n in range(11)
    ]
    settings = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    transformers.Trainer(model, settings, train_dataset=texts, optimizers=(optimizer, None)).train()
    assert [step.phase for step in recorder.steps] == [rdp.Phase.DROP, rdp.Phase.FREEZE] * 4
    assert [step.masks[0].shape for step in recorder.steps] == [(4, 3), (4, 3), (4, 3), (4, 2)] * 2
    for drop, freeze in zip(recorder.steps[::2], recorder.steps[1::2], strict=True):
        rows = freeze.masks[0].shape[1]
        assert identical(drop.masks[0][:, :rows], freeze.masks[0])


def test_the_example_prints_what_moved(capsys: pytest.CaptureFixture[str]) -> None:
    main(steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[2] for line in lines] == ["DROP", "FREEZE"] * 2
    assert all("." in line.split()[3] for line in lines[1::2])
