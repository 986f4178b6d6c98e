"""DropPath that a model brings along: finding it while it is active, and silencing it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_CLASS_PARTS = ("droppath", "stochasticdepth")
_PROBABILITIES = ("drop_prob", "drop_path_prob", "drop_path_rate", "p")
_ON_ANY_CLASS = ("layerdrop", "drop_path_prob")


@dataclass(frozen=True)
class NativeDrop:
    """An attribute of a module that makes it drop paths by itself."""

    name: str
    module: nn.Module
    attribute: str
    probability: float

    def __str__(self) -> str:
        return f"{self.name or type(self.module).__name__}.{self.attribute} = {self.probability:g}"

    def silence(self) -> None:
        """Set the probability to 0."""
        setattr(self.module, self.attribute, 0.0)

    def restore(self) -> None:
        """Set the probability back to what it was."""
        setattr(self.module, self.attribute, self.probability)


def find_native_drops(model: nn.Module) -> list[NativeDrop]:
    """Every active DropPath, StochasticDepth (by class name) or LayerDrop (by attribute) of `model`."""
    found = []
    for name, module in model.named_modules():
        class_name = type(module).__name__.lower()
        drops = any(part in class_name for part in _CLASS_PARTS)
        for attribute in _PROBABILITIES if drops else _ON_ANY_CLASS:
            value = getattr(module, attribute, None)
            if isinstance(value, (int, float)) and value > 0:
                found.append(NativeDrop(name, module, attribute, float(value)))
                break
    return found
