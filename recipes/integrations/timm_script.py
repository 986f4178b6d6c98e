"""RDP in a script after timm's train.py: its factories, loss scaler, clipping, EMA, schedule and checkpoint saver.

    pip install '.[integrations]'
    python recipes/integrations/timm_script.py             # seconds on a CPU

Beyond the two lines, a file beside each of timm's checkpoints keeps the phase and the masks. Leave timm's own
`drop_path_rate` at 0, as it is by default: both would drop. Prints a line a step: its phase, and which branches moved.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from digits import digits, small_vit
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, accuracy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from watch import Watch

import rdp


class Run:
    """What timm's train.py keeps in local variables.

    Args:
        output: Folder of the checkpoints.
        opt: Name of an optimizer of timm's factory.
        updates: Optimizer steps of an epoch.
        accumulate: Batches of an optimizer step.
    """

    def __init__(self, output: Path, opt: str = "adamw", updates: int = 4, accumulate: int = 2) -> None:
        self.output, self.updates, self.accumulate = output, updates, accumulate
        self.model = small_vit()
        self.handle = rdp.attach(self.model, rate=0.5, mode="batch")  # the first line
        optimizer = create_optimizer_v2(self.model, opt=opt, lr=1e-3, weight_decay=0.05)
        self.optimizer = self.handle.wrap(optimizer)  # the second
        Watch(self.handle, self.optimizer)
        self.loss_scaler = NativeScaler(device="cpu")
        self.model_ema = ModelEmaV3(self.model, decay=0.9)  # a copy of an attached model is a plain one
        self.lr_scheduler, _ = create_scheduler_v2(
            self.optimizer, num_epochs=20, step_on_epochs=False, updates_per_epoch=updates
        )
        self.loader = DataLoader(digits(32 * updates * accumulate), batch_size=32)
        self.saver = CheckpointSaver(
            self.model,
            self.optimizer,
            args=Namespace(model="vit_tiny_patch16_224"),
            model_ema=self.model_ema,
            amp_scaler=self.loss_scaler,
            checkpoint_dir=str(output),
            recovery_dir=str(output),
        )
        self.epoch = 0

    def resume(self, checkpoint: str) -> None:
        """Continue after the epoch of one of timm's checkpoints in the output folder."""
        path = str(self.output / checkpoint)
        self.epoch = resume_checkpoint(self.model, path, self.optimizer, self.loss_scaler)
        load_checkpoint(self.model_ema.module, path, use_ema=True)
        self.handle.load_state_dict(torch.load(self.output / f"rdp-{self.epoch - 1}.pt", weights_only=True))
        self.lr_scheduler.step_update(self.epoch * self.updates)

    def train(self, epochs: int) -> None:
        """Train up to an epoch, saving each."""
        for epoch in range(self.epoch, epochs):
            self._train_one_epoch(epoch)
            top1 = self._validate(self.model)
            self._validate(self.model_ema.module)
            torch.save(self.handle.state_dict(), self.output / f"rdp-{epoch}.pt")
            self.saver.save_checkpoint(epoch, metric=top1)

    def _train_one_epoch(self, epoch: int) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        for batch, (images, labels) in enumerate(self.loader):
            last_of_step = (batch + 1) % self.accumulate == 0
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = cross_entropy(self.model(images), labels) / self.accumulate
            self.loss_scaler(
                loss,
                self.optimizer,
                clip_grad=1.0,
                parameters=model_parameters(self.model),
                need_update=last_of_step,
            )
            if not last_of_step:
                continue
            self.optimizer.zero_grad()
            update = epoch * self.updates + (batch + 1) // self.accumulate
            self.model_ema.update(self.model, step=update)
            self.lr_scheduler.step_update(num_updates=update)

    @torch.no_grad()
    def _validate(self, model: nn.Module) -> float:
        model.eval()
        images, labels = digits(1280)[1024:]
        (top1,) = accuracy(model(images), labels)
        return top1.item()


def main(epochs: int = 2, opt: str = "adamw") -> None:
    """Train for a few epochs of four optimizer steps each.

    Args:
        epochs: Number of epochs.
        opt: Name of an optimizer of timm's factory.
    """
    if epochs < 1:
        raise SystemExit(f"--epochs must be at least 1; got {epochs}")
    with TemporaryDirectory() as folder:
        run = Run(Path(folder), opt)
        run.train(epochs)
        print(run.handle)


if __name__ == "__main__":
    tyro.cli(main)
