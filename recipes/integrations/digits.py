"""What the examples of this folder train on: real digits that come with the recipes, and a small ViT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

BATCHES = 32  # of 32 digits; two make an optimizer step
MNIST10K = Path(__file__).parents[1] / "data" / "mnist10k.npz"


def digits(samples: int) -> TensorDataset:
    """The first `samples` digits: images `Tensor[samples, 1, 28, 28]`, labels `Tensor[samples]`."""
    with np.load(MNIST10K) as file:
        images, labels = file["images"][:samples], file["labels"][:samples]
    normalized = (torch.from_numpy(images)[:, None].float() / 255 - 0.1307) / 0.3081
    return TensorDataset(normalized, torch.from_numpy(labels).long())


def check_steps(steps: int) -> None:
    """Refuse a number of optimizer steps that one pass over the digits does not have."""
    if not 1 <= steps <= BATCHES // 2:
        raise SystemExit(f"--steps must be from 1 to {BATCHES // 2}, one pass over the digits; got {steps}")


def small_vit() -> nn.Module:
    """A ViT of four blocks, so with eight residual branches."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=10,
        depth=4,
        embed_dim=24,
        num_heads=3,
    )
