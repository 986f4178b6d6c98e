"""RDP in the Hugging Face Trainer.

    pip install '.[integrations]'
    python recipes/integrations/hf_trainer.py              # seconds on a CPU, nothing is downloaded

Beyond the two lines, `SaveRdp` keeps the phase and the masks in the Trainer's checkpoint folders. Prints a line a step:
its phase, and which branches moved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from digits import check_steps, digits
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from watch import Watch

import rdp


class SaveRdp(TrainerCallback):
    """Saves the state of the handle beside that of the optimizer, and loads it when training resumes from there."""

    def __init__(self, handle: rdp.ResidualDropPath) -> None:
        self.handle = handle

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save."""
        if state.is_world_process_zero:
            torch.save(self.handle.state_dict(), self._file(args, state))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Load, if this is no new run."""
        if state.global_step > 0:
            self.handle.load_state_dict(torch.load(self._file(args, state), weights_only=True))

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "rdp.pt")


class Texts(Dataset):
    """Digits as texts of 49 words, the brightness of a patch of 4 x 4 pixels each, out of a vocabulary of 16."""

    def __init__(self, samples: int) -> None:
        images, self.labels = digits(samples)[:]
        patches = avg_pool2d(images, 4).flatten(1)
        self.words = (15 * (patches - patches.min()) / (patches.max() - patches.min())).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def make_trainer(output_dir: str, steps: int, accumulate: int = 2, **arguments: Any) -> Trainer:
    """A Trainer whose model is attached.

    Args:
        output_dir: For its checkpoints.
        steps: Number of optimizer steps.
        accumulate: Batches of a step.
        arguments: Further `TrainingArguments`.
    """
    config = BertConfig(
        vocab_size=16,
        max_position_embeddings=49,
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_labels=10,
    )
    model = BertForSequenceClassification(config)
    handle = rdp.attach(model, rate=0.5, mode="batch")  # the first line
    optimizer = handle.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))  # the second
    Watch(handle, optimizer)
    settings = TrainingArguments(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=accumulate,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(
        model,
        settings,
        train_dataset=Texts(1024),
        eval_dataset=Texts(64),
        optimizers=(optimizer, None),  # None: the Trainer makes its own schedule of this optimizer
        callbacks=[SaveRdp(handle)],
    )


def main(steps: int = 8) -> None:
    """Train for a few optimizer steps of two batches each.

    Args:
        steps: Number of optimizer steps, up to 16.
    """
    check_steps(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, steps, save_strategy="no")
        trainer.train()


if __name__ == "__main__":
    tyro.cli(main)
