"""One model of the zoo: how it is built, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.found import Found, find

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo."""

    source: str
    """The package: "timm", "torchvision" or "transformers"."""
    family: str
    name: str
    build: Callable[..., nn.Module] = field(repr=False)
    """`build(drop_path_rate=0.1)` turns the model's own DropPath on; raises TypeError where it has none."""
    inputs: Callable[[int], Inputs] = field(repr=False)
    """`inputs(rows)`: keyword arguments of its forward, made with the global RNG on the default device."""
    smaller: tuple[tuple[Callable[..., nn.Module], Callable[[int], Inputs]], ...] = field(default=(), repr=False)
    """Quicker (build, inputs) for checks that compute, not all of which need to work."""
    check: bool = True
    """Is it small enough for checks that compute?"""
    on_meta: bool = True
    """Does its forward run without numbers?"""

    def build_quick(self) -> tuple[nn.Module, Inputs]:
        """The model and two rows of inputs, at the smallest size that works."""
        for build, inputs in self.smaller:
            try:
                model, rows = build().eval(), inputs(2)
                with torch.no_grad():
                    model(**rows)
            except Exception:  # whatever a model says to a size that it does not take
                continue
            return model, rows
        return self.build(), self.inputs(2)

    def find(self) -> Found:
        """What is found in the model; on `meta` where it can run there."""
        torch.manual_seed(0)
        with torch.device("meta" if self.on_meta else "cpu"):
            return find(self.build(), self.inputs(2))

    @property
    def key(self) -> str:
        """Unique name: package and model."""
        return f"{self.source}/{self.name}"


def images(size: int | tuple[int, ...] = 224, channels: int = 3, name: str = "x") -> Callable[[int], Inputs]:
    """Inputs maker: `rows` random images of `size` pixels."""
    shape = (channels, size, size) if isinstance(size, int) else size
    return lambda rows: {name: torch.randn(rows, *shape)}


def drops_paths(module: nn.Module) -> bool:
    """Is this an active DropPath?"""
    kind = type(module).__name__.lower()
    active = getattr(module, "drop_prob", 0) or getattr(module, "p", 0)
    return bool(active) and ("droppath" in kind or "stochasticdepth" in kind)
