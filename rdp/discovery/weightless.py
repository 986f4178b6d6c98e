"""A model without numbers: parameters and buffers on the `meta` device for as long as it is looked at.

Functions and shapes are all that a trace records. On `meta` they cost next to nothing, however large the model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rdp import trees
from rdp.discovery.forwards import Inputs, contents, only_device, put_back
from rdp.inputs import fresh

_LIKE_WHAT_IT_TAKES = frozenset(
    [
        functional.batch_norm,
        functional.gelu,
        functional.relu,
        functional.silu,
        *(function for at in (torch, Tensor) for function in (at.relu, at.sigmoid, at.tanh)),
    ]
)
_LIKE_BOTH = frozenset(function for at in (torch, Tensor) for function in (at.add, at.div, at.mul, at.sub))
"""Functions that return a tensor of the form of their first; of two that are alike. Others are asked of torch."""


def on_meta(inputs: Inputs) -> Inputs:
    """The same inputs without numbers.

    Raises:
        ValueError: If some are held by objects of unknown kinds.
    """
    leaves = trees.leaves(inputs).values()
    if any(isinstance(held, Tensor) for leaf in leaves if trees.is_opaque(leaf) for held in trees.held(leaf)):
        raise ValueError("an input tensor cannot be moved")
    stand_ins: dict[int, Tensor] = {}  # what is one tensor in two places stays one

    def move(leaf: Any) -> Any:
        return stand_ins.setdefault(id(leaf), leaf.to("meta")) if isinstance(leaf, Tensor) else leaf

    moved = fresh(trees.map_leaves(move, inputs))
    if not all(tensor.is_meta for tensor in trees.tensors(moved)):
        raise ValueError("an input tensor cannot be moved")
    return moved


def ways_to_run(
    model: nn.Module, inputs: Inputs, shortcuts: bool = True
) -> Iterator[tuple[AbstractContextManager[None], Inputs]]:
    """On `meta` if that can be, and with numbers; and what to call the model with there."""
    if only_device(model) is not None:
        with suppress(Exception):
            yield weightless(model, shortcuts), on_meta(inputs)
    yield left_alone(model), fresh(inputs)


@contextmanager
def weightless(model: nn.Module, shortcuts: bool = True) -> Iterator[None]:
    """Hold parameters and buffers on `meta`, and take back whatever forwards leave in the modules.

    Args:
        model: The model.
        shortcuts: Do not call some functions whose shapes are known; who counts operations needs them called.
    """
    stand_ins: dict[int, Tensor] = {}  # shared tensors stay shared
    with left_alone(model):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    stand_in = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                    module._parameters[name] = stand_ins.setdefault(id(parameter), stand_in)  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = stand_ins.setdefault(id(buffer), buffer.detach().to("meta"))
        with _Shapes() if shortcuts else nullcontext():
            yield


class _Shapes(TorchFunctionMode):
    """Says at once what shape some functions return on `meta`, where torch spends up to a millisecond on each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and type(args[0]) is Tensor and args[0].is_meta:
            alone = func in _LIKE_WHAT_IT_TAKES and not (kwargs or {}).get("inplace")
            both = func in _LIKE_BOTH and len(args) == 2 and not kwargs and _are_alike(*args)
            if (alone or both) and args[0].is_floating_point():
                return torch.empty_like(args[0])
            if func is functional.layer_norm:
                return args[0].new_empty(args[0].shape)
            if func is functional.linear and len(args) > 1 and args[0].shape[-1:] == args[1].shape[-1:]:
                return args[0].new_empty((*args[0].shape[:-1], args[1].shape[0]))
        return func(*args, **(kwargs or {}))


def _are_alike(x: Tensor, y: object) -> bool:
    return type(y) is Tensor and x.dtype == y.dtype and x.shape == y.shape


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Take back whatever forwards leave in the modules."""
    # FSDP puts other parameters into the modules of such a model now and then, and keeps count.
    sharded = any(type(module).__module__.startswith("torch.distributed.") for module in model.modules())
    before = [(module, contents(module)) for module in model.modules() if not sharded]
    try:
        yield
    finally:
        for module, held in before:
            put_back(module, held)
