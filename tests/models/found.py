"""What `rdp.attach` finds in a model, whether that is something or nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

import rdp

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


class Found(NamedTuple):
    """The branches of a model, and the residual sums whose branches are refused."""

    branches: tuple[rdp.Branch, ...]
    refused: tuple[rdp.Refusal, ...]


class Beside(nn.Module):
    """A model beside a residual block, so that attaching does not raise where all branches of the model are refused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.block = model, nn.Linear(1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        tensor = next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
        x = tensor.flatten(1)[:, :1].to(self.block.weight.dtype)
        return self.model(*args, **kwargs), x + self.block(x)


def find(model: nn.Module, inputs: Inputs, **arguments: Any) -> Found:
    """Attach to a model, remove the handle, and return what it found.

    Args:
        model: Any model; on `meta` too.
        inputs: Of its forward, as `example_inputs` takes them.
        arguments: Others of `rdp.attach`.
    """
    arguments = {"decay": "constant", "compute": "dense", "example_inputs": inputs} | arguments
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* left ungated", rdp.RdpWarning)
        try:
            with rdp.attach(model, 0.5, **arguments) as handle:
                return Found(handle.branches, handle.refused)
        except rdp.BranchError as nothing:
            if "; refused: " not in str(nothing):
                return Found((), ())
            with rdp.attach(Beside(model), 0.5, **arguments) as handle:
                assert [branch.name for branch in handle.branches] == ["block"]
                return Found((), tuple(map(_without_prefix, handle.refused)))


def _without_prefix(refusal: rdp.Refusal) -> rdp.Refusal:
    name, block = (name.removeprefix("model").removeprefix(".") for name in (refusal.name, refusal.block))
    return replace(refusal, name=name, block=block, reason=refusal.reason.replace("`model.", "`"))
