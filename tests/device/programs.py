"""Tiny models of several kinds, and training them step by step, on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rdp
from device.simulated import Record, recording

ROWS = 8


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # each imports what it needs: that takes seconds

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=4)


def resnet() -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (1, 1, 1, 1), num_classes=4, channels=(2, 2, 2, 2), stem_width=4)


def convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=4, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4, num_classes=4,
        drop_path_rate=0.0,
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **no_dropout
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=8,
            vocab_size=20,
            n_positions=8,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            **no_dropout,
        )
    )


class ConditionedBlock(nn.Module):
    """Two branches, `x + g(c) * f(x)`, whose scales and gates are parts of what one layer makes, as in DiT."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.modulation, self.first, self.second = (nn.Linear(width, n * width) for n in (4, 1, 1))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Two of Tensor[N, width] -> Tensor[N, width]."""
        scale, gate, second_scale, second_gate = self.modulation(c).chunk(4, dim=-1)
        x = x + gate * self.first(x * (1 + scale))
        return x + second_gate * self.second(x * (1 + second_scale))


class Conditioned(nn.Module):
    """Images are what is transformed, and, apart from that, the condition."""

    def __init__(self, size: int = 32, width: int = 8) -> None:
        super().__init__()
        self.stem, self.condition = (nn.Linear(3 * size * size, width) for _ in range(2))
        self.blocks = nn.ModuleList(ConditionedBlock(width) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """Tensor[N, 3, size, size] -> Tensor[N, width]."""
        x, c = self.stem(images.flatten(1)), self.condition(images.flatten(1))
        for block in self.blocks:
            x = block(x, c)
        return x


def conditioned() -> nn.Module:
    return Conditioned()


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (vit, resnet, convnext, swin, bert, gpt2, conditioned)
}


def inputs_of(name: str, rows: int = ROWS, seed: int = 0) -> Tensor:
    """A batch of noise, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("bert", "gpt2"):
        return torch.randint(0, 20, (rows, 5), generator=generator)
    size = 16 if name == "vit" else 32
    return torch.randn(rows, 3, size, size, generator=generator)


def build(name: str) -> nn.Module:
    """The same model, in training mode, at every call."""
    torch.manual_seed(1)
    return MODELS[name]().train()


@dataclass
class Cost:
    """What a training step has asked of the device."""

    phase: str
    gradients: Record
    """Forwards and backwards."""
    update: Record
    """The optimizer."""

    @property
    def waits(self) -> list[str]:
        """Of all of it."""
        return [*self.gradients.waits, *self.update.waits]


class Run:
    """A model in training.

    Args:
        name: Of the model.
        device: Where it trains.
        batches: On the CPU; a step accumulates the gradients of all.
        adam: AdamW instead of SGD with momentum.
        options: Of `rdp.attach`; None trains plainly.
    """

    def __init__(
        self, name: str, device: torch.device | str, batches: list[Tensor], adam: bool, options: dict[str, Any] | None
    ) -> None:
        self.model = build(name).to(device)
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()  # torch moves tensors of a class of their own one by one
        self.batches = [x.to(device) for x in batches]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-3)
            if adam
            else torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        )
        self.handle = None
        if options is not None:
            given = {"decay": "constant", "seed": 3, "verify": False} | options
            self.handle = rdp.attach(self.model, example_inputs=self.batches[0], **given)
            self.optimizer = self.handle.wrap(self.optimizer)

    def step(self) -> Cost:
        """Train for one step."""
        phase = "PLAIN" if self.handle is None else self.handle.phase.name
        self.optimizer.zero_grad()
        with recording() as gradients:
            for x in self.batches:
                output = self.model(x)
                first = output if isinstance(output, Tensor) else output[0]
                first.square().mean().backward()
        with recording() as update:
            self.optimizer.step()
        return Cost(phase, gradients, update)

    def numbers(self) -> dict[str, Tensor]:
        """All parameters and buffers, on the CPU."""
        return {name: copy.copy(getattr(x, "raw", x)) for name, x in self.model.state_dict().items()}
