"""DropPath that a model brings along: the settings that make it drop, and silencing them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_CLASS_PARTS = ("droppath", "stochasticdepth", "layerdrop")
_PROBABILITIES = ("drop_prob", "drop_path_prob", "drop_path_rate", "p", "prob")
_ON_ANY_CLASS = ("layerdrop", "drop_path_prob", "sample_drop_ratio")
_SPEAKING = re.compile("layer_?drop|drop_?path|path_?drop|stochastic|surviv|skip|depth")


@dataclass(frozen=True)
class NativeDrop:
    """A setting that makes a model drop paths by itself.

    Attributes:
        name: Of what holds it, as one writes it after the model.
        holder: A module, or the configuration of one: any object, or a dict.
        attribute: The setting.
        probability: What it is.
        off: With this value nothing is dropped.
    """

    name: str
    holder: Any
    attribute: str
    probability: Any
    off: Any = 0.0

    def __str__(self) -> str:
        value = f"{self.probability:g}" if isinstance(self.probability, (int, float)) else str(self.probability)
        return f"{self.name or type(self.holder).__name__}.{self.attribute} = {value}"

    @property
    def speaks(self) -> bool:
        """Does its name say what it does?"""
        return _SPEAKING.search(self.attribute.lower()) is not None

    def silence(self) -> None:
        """Let nothing be dropped."""
        self._write(self.off)

    def restore(self) -> None:
        """Set the probability back to what it was."""
        self._write(self.probability)

    def _write(self, value: Any) -> None:
        if isinstance(self.holder, dict):
            self.holder[self.attribute] = value
        elif isinstance(self.holder, nn.Module):
            setattr(self.holder, self.attribute, value)
        else:
            object.__setattr__(self.holder, self.attribute, value)  # it may be frozen


def find_native_drops(model: nn.Module) -> list[NativeDrop]:
    """Every active DropPath, StochasticDepth, LayerDrop (by class name or attribute) of `model`.

    What has other names is known by what it does, see `discovery/own_dropping.py`.
    """
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


def settings_around(model: nn.Module, names: Iterable[str]) -> list[list[NativeDrop]]:
    """Whatever could be a probability in the named modules, the modules around them, and their configurations.

    Returns:
        Settings that are one to the user, for instance one of each layer, together; likely ones first.
    """
    holders: dict[int, tuple[str, Any]] = {}
    around = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(len(parts) + 1)}
    for name in sorted(around):
        _collect(name, model.get_submodule(name), holders)
    alike: dict[tuple[Any, ...], list[NativeDrop]] = {}
    for name, holder in holders.values():
        for attribute, value in _items(holder).items():
            for off in (0.0, 1.0):
                if (silent := _all(off, value)) is not None:
                    setting = NativeDrop(name, holder, attribute, value, silent)
                    alike.setdefault((off, type(holder), attribute), []).append(setting)
    return sorted(alike.values(), key=_unlikely)


def _unlikely(settings: list[NativeDrop]) -> tuple[bool, bool]:
    first = settings[0]
    keeps = re.search("surviv|keep", first.attribute.lower()) is not None
    off = first.off if isinstance(first.off, float) else first.off[0]
    return not (first.speaks and off == keeps), off == 1


def _all(off: float, value: Any) -> Any:
    """`off` in the form of `value`, where that is a probability, or several; None where not."""
    if isinstance(value, float):
        return off if 0 < value <= 1 else None
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, float) and 0 <= v <= 1 for v in value):
        return type(value)([off] * len(value)) if any(value) and not hasattr(value, "_fields") else None
    return None


def _collect(name: str, holder: Any, holders: dict[int, tuple[str, Any]], depth: int = 0) -> None:
    if id(holder) in holders:
        return
    holders[id(holder)] = name, holder
    for key, value in _items(holder).items():
        if depth < 2 and _is_configuration(value):
            _collect(f"{name}.{key}" if name else key, value, holders, depth + 1)


def _items(holder: Any) -> Mapping[str, Any]:
    if isinstance(holder, dict):
        return {key: value for key, value in holder.items() if isinstance(key, str)}
    private = isinstance(holder, nn.Module)  # parameters, buffers, hooks
    return {key: value for key, value in vars(holder).items() if not (private and key.startswith("_"))}


def _is_configuration(value: Any) -> bool:
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)) or callable(value):
        return False
    return isinstance(value, dict) or (hasattr(value, "__dict__") and not type(value).__module__.startswith("torch"))
