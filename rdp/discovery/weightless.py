"""A model without numbers: parameters and buffers on the `meta` device for as long as it is looked at.

Functions and shapes are all that a trace records. On `meta` they cost next to nothing, however large the model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rdp import trees
from rdp.discovery.forwards import Inputs, contents, put_back


def on_meta(inputs: Inputs) -> Inputs:
    """The same inputs without numbers.

    Raises:
        ValueError: If some are held by objects of unknown kinds.
    """
    moved: Inputs = trees.map_leaves(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
    if not all(tensor.is_meta for tensor in trees.tensors(moved)):
        raise ValueError("an input tensor cannot be moved")
    return moved


@contextmanager
def weightless(model: nn.Module) -> Iterator[None]:
    """Hold parameters and buffers on `meta`, and take back whatever forwards leave in the modules."""
    before = [(module, contents(module)) for module in model.modules()]
    stand_ins: dict[int, Tensor] = {}  # shared tensors stay shared
    try:
        for module, _ in before:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    stand_in = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                    module._parameters[name] = stand_ins.setdefault(id(parameter), stand_in)  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = stand_ins.setdefault(id(buffer), buffer.detach().to("meta"))
        yield
    finally:
        for module, held in before:
            put_back(module, held)
