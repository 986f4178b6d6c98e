"""What benchmark.py measures: models, ways to train them with rdp, and other ways to drop paths in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from benchmark_options import Args, Name
from timm.layers import drop_path
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

import rdp

RDP: dict[str, dict[str, Any]] = {
    "row": {},
    "row-fixed": {"sampling": "fixed"},
    "row-dense": {"compute": "dense"},
    "row-ghost": {"compute": "ghost"},
    "batch": {"mode": "batch"},
    "batch-ghost": {"mode": "batch", "compute": "ghost"},
    "drop-row": {"phases": ("drop",)},
    "drop-row-scaled": {"phases": ("drop",), "scale_by_keep": True},
    "drop-fixed": {"phases": ("drop",), "sampling": "fixed"},
    "drop-fixed-scaled": {"phases": ("drop",), "sampling": "fixed", "scale_by_keep": True},
}
"""The options of `rdp.attach`."""
GATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "timm": lambda z, rate: drop_path(z, rate, training=True),
    "torchvision": lambda z, rate: stochastic_depth(z, rate, "row"),
    "mask": lambda z, rate: z * (torch.rand([len(z)] + [1] * (z.dim() - 1), device=z.device) >= rate).to(z.dtype),
}
"""What becomes of the output of a branch."""


@dataclass
class Contender:
    """A model in training, and the phases that its steps go through."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    blocks: list[nn.Module]
    """Those that hold its branches."""
    phases: tuple[str, ...] = ("train",)
    computes: tuple[str, ...] = ()
    """How each branch is computed, if rdp does it."""
    does: object = None
    """Two contenders of which this is equal run alike."""


class ResidualMLP(nn.Module):
    """`x + f(x)`, 32 times, each with a LayerNorm."""

    def __init__(self, width: int = 512, depth: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, width] -> Tensor[N, width]."""
        for block in self.blocks:
            x = x + block(x)
        return x


class IndexAddBlock(Block):
    """As DINOv2's: both branches run on some of the rows, and are added to these, with the kept rows scaled up."""

    rate = 0.0

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Tensor[N, tokens, width] -> the same."""
        for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
            kept = len(x) - round(self.rate * len(x))
            rows = torch.randperm(len(x), device=x.device)[:kept]
            x = torch.index_add(x, 0, rows, branch(norm(x[rows])), alpha=len(x) / kept)
        return x


class SkippedBlock(Block):
    """As in Composer and torchtune: the block runs for all rows, or for none; its branches share one fate."""

    rate = 0.0

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Tensor[N, tokens, width] -> the same."""
        output: Tensor = super().forward(x) if torch.rand(()) >= self.rate else x
        return output


BLOCKS: dict[str, type[IndexAddBlock | SkippedBlock]] = {"index-add": IndexAddBlock, "whole-blocks": SkippedBlock}
"""Blocks of a VisionTransformer that drop by themselves."""


def build(name: str, args: Args, block: type[nn.Module] | None = None) -> nn.Module:
    """The model in training mode, with blocks of another class if one is given."""
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = ResidualMLP()
    else:
        sized = {"img_size": args.resolution} if name.startswith(("vit", "deit", "swin", "test_vit")) else {}
        blocks = {} if block is None else {"block_fn": block}
        model = timm.create_model(name, num_classes=100, drop_path_rate=0.0, **sized, **blocks)
    model = model.to(args.device).train()
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def inputs_of(name: str, args: Args) -> Tensor:
    """A batch of noise."""
    if name == "mlp":
        return torch.randn(args.batch_size * 32, 512, device=args.device)
    x = torch.randn(args.batch_size, 3, args.resolution, args.resolution, device=args.device)
    return x.to(memory_format=torch.channels_last) if args.channels_last else x


def applies(name: str, way: Name, args: Args) -> bool:
    """Whether a model can be trained so."""
    return way not in BLOCKS or isinstance(build(name, args), VisionTransformer)


def make(name: str, way: Name | Literal["plain"], rate: float, args: Args, x: Tensor) -> Contender:
    """A contender, or plain training."""
    block = BLOCKS.get(way)
    if block is not None:
        block.rate = rate
    model = build(name, args, block)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if block is not None:
        return Contender(model, optimizer, list(model.get_submodule("blocks").children()), does=way)
    options = RDP.get(way, {})
    handle = rdp.attach(model, rate, decay=args.decay, example_inputs=x, seed=1, **options)
    blocks = list(dict.fromkeys(model.get_submodule(branch.block) for branch in handle.branches))
    if way in RDP:
        phases = ("DROP",) if "phases" in options else ("DROP", "FREEZE")
        computes = tuple(branch.compute for branch in handle.branches)
        does = (*((key, value) for key, value in options.items() if key != "compute"), computes)
        return Contender(model, handle.wrap(optimizer), blocks, phases, computes, does)
    handle.remove()
    for branch in handle.branches if way in GATES else ():
        gate, own = GATES[way], branch.rate
        model.get_submodule(branch.name).register_forward_hook(lambda _m, _i, z, gate=gate, own=own: gate(z, own))
    return Contender(model, optimizer, blocks, does=way)
