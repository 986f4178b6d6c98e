"""Where modules keep their parameters.

The parameters themselves may not be kept for long: FSDP replaces them when a model is sharded, and again while a module
runs. What stays is the place that they are put into.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one parameter, under one of its names."""

    name: str
    _holder: dict[str, nn.Parameter | None]
    _key: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """What is there now."""
        return self._holder.get(self._key)


def slots(model: nn.Module) -> dict[str, Slot]:
    """By name, the places of all parameters; a shared one has several."""
    return {
        name: Slot(name, module._parameters, name.rpartition(".")[2])
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, _ in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
    }


def present(places: list[Slot]) -> list[nn.Parameter]:
    """The parameters that are in `places` now."""
    return [p for p in (slot.parameter for slot in places) if p is not None]
