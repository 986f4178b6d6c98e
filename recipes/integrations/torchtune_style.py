"""RDP in a recipe class as torchtune writes them: setup, train, save and load checkpoints; optionally compiled.

    pip install '.[integrations]'
    python recipes/integrations/torchtune_style.py                         # seconds on a CPU
    python recipes/integrations/torchtune_style.py --compile inductor      # a minute to compile

Two lines; the checkpoint gets one more entry. A compiled model must know its branches before it is traced, so `setup`
passes `example_inputs`. Prints a line a step: its phase, and which branches moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from digits import check_steps, digits, small_vit
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from watch import Watch

import rdp


class Recipe:
    """Full fine-tuning on one device.

    Args:
        batch_size: Samples of a forward.
        accumulate: Forwards of an optimizer step (`gradient_accumulation_steps`).
        compile: Backend of `torch.compile`, or None.
    """

    def __init__(self, batch_size: int = 32, accumulate: int = 2, compile: str | None = None) -> None:
        self.batch_size, self.accumulate, self.compile = batch_size, accumulate, compile
        self.global_step = 0

    def setup(self, checkpoint: dict[str, Any] | None = None) -> None:
        """Build everything, or continue from a checkpoint."""
        self.model = small_vit()
        dataset = digits(1024)
        self.loader = DataLoader(dataset, self.batch_size)
        self.rdp = rdp.attach(self.model, rate=0.5, mode="batch", example_inputs=dataset[:2][0])  # the first line
        self.optimizer = self.rdp.wrap(torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True))  # the second
        Watch(self.rdp, self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 4))
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            self.rdp.load_state_dict(checkpoint["rdp"])
            self.global_step = checkpoint["global_step"]
        if self.compile is not None:
            for block in self.model.blocks:  # one by one, as torchtune does, and as batch mode saves work
                block.compile(backend=self.compile)

    def train(self, max_steps: int) -> None:
        """Train up to an optimizer step."""
        self.model.train()
        batches = iter(self.loader)
        for _ in range(self.global_step * self.accumulate):
            next(batches)
        for _ in range(self.global_step, max_steps):
            samples = 0
            for _ in range(self.accumulate):
                images, labels = next(batches)
                samples += len(labels)
                cross_entropy(self.model(images), labels, reduction="sum").backward()
            for p in self.model.parameters():  # the mean over all samples of the step, as torchtune's scale_grads
                if p.grad is not None:
                    p.grad.div_(samples)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
            self.global_step += 1

    def save_checkpoint(self, path: Path) -> None:
        """Save what `setup` continues from; `torch.load(path, weights_only=True)` reads it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rdp": self.rdp.state_dict(),
            "global_step": self.global_step,
        }
        torch.save(state, path)


def main(steps: int = 8, compile: str | None = None) -> None:
    """Train for a few optimizer steps of two batches each.

    Args:
        steps: Number of optimizer steps, up to 16.
        compile: Backend of `torch.compile`.
    """
    check_steps(steps)
    recipe = Recipe(compile=compile)
    recipe.setup()
    recipe.train(steps)
    print(recipe.rdp)


if __name__ == "__main__":
    tyro.cli(main)
