"""Options of benchmark.py, of which benchmark_compiled.py has some too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
    batch_size: int = 8
    resolution: int = 224
    rate: float = 0.1
    decay: Literal["linear", "constant"] = "constant"
    """Constant compares with the arithmetic of docs/cost.md; training defaults to linear, which drops half as much."""
    rounds: int = 4
    """Timed rounds of every contender; the first round is a warm-up and not counted. 0 times nothing."""
    cycles: int = 8
    """How many DROP and FREEZE steps FLOPs and memory are averaged over."""
    rivals: bool = True
    """Also time timm's DropPath, torchvision's StochasticDepth and the multiplication by a mask."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    json_file: Path | None = None
    """Also write the rows here."""
