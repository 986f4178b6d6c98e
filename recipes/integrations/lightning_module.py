"""RDP in PyTorch Lightning, with automatic and with manual optimization.

    pip install '.[integrations]'
    python recipes/integrations/lightning_module.py              # seconds on a CPU
    python recipes/integrations/lightning_module.py --manual

Beyond the two lines, `on_save_checkpoint` and `on_load_checkpoint` keep the phase and the masks in Lightning's own
checkpoint. Prints a line a step: its phase, and which branches moved.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import tyro
from digits import check_steps, digits, small_vit
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from watch import Watch

import rdp


class Digits(L.LightningModule):
    """A classifier of digits.

    Args:
        manual: Use manual optimization.
        accumulate: Batches of one optimizer step under manual optimization; automatic has the Trainer's
            `accumulate_grad_batches`.
    """

    def __init__(self, manual: bool = False, accumulate: int = 2) -> None:
        super().__init__()
        self.net = small_vit()
        self.handle = rdp.attach(self.net, rate=0.5, mode="batch")  # the first line
        self.automatic_optimization = not manual
        self.accumulate = accumulate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The second line."""
        optimizer = self.handle.wrap(torch.optim.AdamW(self.parameters(), lr=1e-3))
        Watch(self.handle, optimizer)
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The accuracy of a batch; the model is in eval mode, so this is the plain network."""
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the phase and the masks with the rest."""
        checkpoint["rdp"] = self.handle.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue in the phase, and with the masks, of the checkpoint."""
        self.handle.load_state_dict(checkpoint["rdp"])


def main(steps: int = 8, manual: bool = False) -> None:
    """Train for a few optimizer steps of two batches each.

    Args:
        steps: Number of optimizer steps, up to 16.
        manual: Use manual optimization.
    """
    check_steps(steps)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2 * steps,
        accumulate_grad_batches=1 if manual else 2,
        val_check_interval=4,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Digits(manual)
    trainer.fit(module, DataLoader(digits(1024), batch_size=32), DataLoader(digits(256), batch_size=256))
    print(module.handle)


if __name__ == "__main__":
    tyro.cli(main)
