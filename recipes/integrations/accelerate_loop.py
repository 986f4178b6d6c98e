"""RDP in an Accelerate loop, with gradient accumulation, clipping, a schedule and Accelerate's own checkpoints.

    pip install '.[integrations]'
    python recipes/integrations/accelerate_loop.py                     # seconds on a CPU
    python recipes/integrations/accelerate_loop.py --precision bf16

The two lines come before `prepare`, since what `prepare` returns skips steps while it accumulates.
`register_for_checkpointing` keeps the phase and the masks in `save_state` and `load_state`. Prints a line a step: its
phase, and which branches moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from digits import check_steps, digits, small_vit
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from watch import Watch

import rdp


def train(
    accelerator: Accelerator, batches: int, save_to: Path | None = None, resume_from: Path | None = None
) -> rdp.ResidualDropPath:
    """Train until `batches` batches have been seen; returns the handle."""
    model = small_vit()
    handle = rdp.attach(model, rate=0.5, mode="batch")  # the first line
    optimizer = handle.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))  # the second
    Watch(handle, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    loader = DataLoader(digits(1024), batch_size=32)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    accelerator.register_for_checkpointing(handle)

    seen = 0
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        seen = handle.step_count * accelerator.gradient_accumulation_steps
    for images, labels in accelerator.skip_first_batches(loader, seen):
        if seen == batches:
            break
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(images), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seen += 1
        if seen % 4 == 0:
            evaluate(model)
    if save_to is not None:
        accelerator.save_state(str(save_to))
    return handle


@torch.no_grad()
def evaluate(model: torch.nn.Module) -> float:
    """The accuracy on some digits, in eval mode: the plain network."""
    images, labels = digits(1280)[1024:]
    model.eval()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return accuracy


def main(steps: int = 8, precision: Literal["no", "bf16"] = "no") -> None:
    """Train for a few optimizer steps of two batches each.

    Args:
        steps: Number of optimizer steps, up to 16.
        precision: bf16 for automatic mixed precision.
    """
    check_steps(steps)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    print(train(accelerator, batches=2 * steps))


if __name__ == "__main__":
    tyro.cli(main)
