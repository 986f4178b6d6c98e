"""Options of benchmark.py, and the names of what it can measure, which benchmark_contenders.py makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal[
    "row", "row-fixed", "row-dense", "row-ghost", "batch", "batch-ghost",
    "drop-row", "drop-row-scaled", "drop-fixed", "drop-fixed-scaled",
    "timm", "torchvision", "mask", "index-add", "whole-blocks",
]  # fmt: skip


@dataclass
class Args:
    """Options of the benchmark."""

    models: tuple[str, ...] = (
        "resnet50",
        "resnet50d",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "convnext_tiny",
        "swin_tiny_patch4_window7_224",
        "mlp",
    )
    """timm models, or `mlp` for a residual MLP of depth 32."""
    contenders: tuple[Name, ...] = (
        "row", "batch", "row-dense", "row-ghost", "batch-ghost", "timm", "torchvision", "mask",
    )  # fmt: skip
    """RDP by mode, sampling or compute (one that would run as an earlier one does is left out); drop-*: DropPath alone
    (`phases=("drop",)`); and rivals, of which index-add and whole-blocks are for timm's VisionTransformer."""
    compiled: Literal["no", "whole", "blocks"] = "no"
    """Compile the models, plain ones too: as a whole, or each block by itself."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Of `torch.compile`."""
    batch_size: int = 8
    resolution: int = 224
    rates: tuple[float, ...] = (0.1,)
    decay: Literal["linear", "constant"] = "constant"
    """Constant compares with the arithmetic of docs/cost.md; training defaults to linear, which drops half as much."""
    rounds: int = 8
    """Timed rounds, each of a step of every phase between plain ones. 0 times nothing."""
    cycles: int = 8
    """How many steps of each phase FLOPs and peaks are taken from; a compiled model warms up for as many rounds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    json_file: Path | None = None
    """Also write the rows here."""
