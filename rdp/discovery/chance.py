"""Forwards in which every draw comes out low, or every one high: what differs between them, a model does by chance.

On the `meta` device, tensors of one number a row that depend on no data stay numbers, for a model may decide by them
which of its modules to call.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rdp import trees
from rdp.discovery import forwards, ops
from rdp.discovery.forwards import Inputs, as_in_training, generators, own_generators
from rdp.discovery.records import Arguments
from rdp.discovery.trace import Trace
from rdp.discovery.weightless import ways_to_run

_ALMOST_0, _ALMOST_1 = 1e-7, 1 - 1e-7
"""Low and high; not 0 itself, since `rand() > p` is true for a p of 0 but at that one number."""
_FORCED = 600
_LOW, _HIGH = 0x00000040, 0x12DD9BB3
"""Words of a Mersenne twister's state that it puts out as almost nothing, 0x40, and as nothing but ones."""
_REST = (0x92CDB9B7,) * 12 + tuple(range(1, 13))
"""The rest of the 624, for who rejects numbers until one fits: a zero and ones, the highest that `randrange` takes."""


def draws_numbers(model: nn.Module, inputs: Inputs) -> bool:
    """Does a forward as in training draw random numbers, besides those of dropout? Within `forwards.undisturbed`."""
    watch, ended = Watch(), False
    for place, given in ways_to_run(model, inputs):
        with suppress(Exception), place, as_in_training(model), watch:
            before = generators()
            try:
                forwards.run(model, given)
                ended = True
            finally:
                watch.draws += generators() != before
        if ended or watch.draws:
            break
    return watch.draws > 0


def chance_trace(model: nn.Module, inputs: Inputs, high: bool) -> ChanceTrace | None:
    """A forward as in training with all draws low, or high; None if none comes to its end."""
    for place, given in ways_to_run(model, inputs):
        with suppress(Exception), place, as_in_training(model), forced(high):
            trace = ChanceTrace(model, high)
            trace.run(*given)
            return trace
    return None


@contextmanager
def forced(high: bool) -> Iterator[None]:
    """All draws come out low, or high, and Python's and numpy's global generators are put back afterwards."""
    torch.default_generator.manual_seed(0)  # for what cannot be forced; the caller has forked it
    with own_generators(), _Forced(high):
        _force_generators(high)
        yield


class ChanceTrace(Trace):
    """The graph of a forward whose draws are forced.

    Attributes:
        zero: Of values with one number a row that depend on no data: are they zero?
    """

    def __init__(self, model: nn.Module, high: bool) -> None:
        super().__init__(model)
        self.zero: dict[int, bool] = {}
        self._high = high

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        enter = super()._enter(name)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            _force_generators(self._high)
            enter(module, args, kwargs)

        return hook

    def _bind(self, tensor: Tensor, index: int) -> int:
        if not self.values[index].is_data and not tensor.is_meta and _one_a_row(tensor):
            self.zero[index] = bool((tensor == 0).all())
        return super()._bind(tensor, index)


class Watch(TorchFunctionMode):
    """Counts torch's draws of random numbers."""

    draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ops.DRAWS or (name in ops.DROPOUT and _takes_rows_away(args, kwargs or {})):
            self.draws += 1
        return func(*args, **(kwargs or {}))


class _Forced(TorchFunctionMode):
    """Forces torch's draws; generators of the model's own are left as they are."""

    def __init__(self, high: bool) -> None:
        super().__init__()
        self.high = high

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "__get__":
            return func(*args, **kwargs)
        if name in ops.DRAWS:
            kwargs.pop("generator", None)
        given = list(trees.tensors((args, kwargs)))
        if name in ops.DROPOUT and _takes_rows_away(args, kwargs):
            return given[0] * int(self.high)
        moved = _together(args, kwargs, given)
        output = func(*moved[0], **moved[1])
        if isinstance(output, Tensor) and output.is_meta and _one_a_row(output):
            if name in ops.FACTORIES:
                output = func(*moved[0], **moved[1] | {"device": "cpu"})
            elif name in ("to", "type_as") and not given[0].is_meta:
                output = given[0].to(output.dtype)
        return self._force(name, output, args, kwargs) if name in ops.DRAWS else output

    def _force(self, name: str, output: Any, args: Any, kwargs: Any) -> Any:
        if name in ("bernoulli", "bernoulli_"):
            chance = args[1] if len(args) > 1 else kwargs.get("p", args[0] if name == "bernoulli" else 0.5)
            return output.copy_(torch.as_tensor(chance > (_ALMOST_1 if self.high else _ALMOST_0)))
        if name == "randint":
            bounds = [bound for bound in args[:2] if isinstance(bound, int)]
            bounds += [kwargs[key] for key in ("low", "high") if key in kwargs]
            return output.fill_(bounds[-1] - 1 if self.high else sum(bounds[:-1]))
        if not output.is_floating_point():
            return output
        low, width = (args[1], args[2] - args[1]) if name == "uniform_" and len(args) == 3 else (0, 1)
        unit = min(_ALMOST_1, 1 - torch.finfo(output.dtype).eps) if self.high else _ALMOST_0
        return output.fill_(low + width * unit)


def _one_a_row(tensor: object) -> bool:
    """Has a tensor one number for each entry of its first axis, or one for all?"""
    return isinstance(tensor, Tensor) and 0 < tensor.numel() == (tensor.shape[0] if tensor.dim() else 1)


def _takes_rows_away(args: Any, kwargs: Any) -> bool:
    """Is it dropout of one number a row?"""
    chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return bool(args) and _one_a_row(args[0]) and training and chance > 0


def _together(args: Any, kwargs: Any, given: list[Tensor]) -> Arguments:
    """Tensors with numbers go to `meta` where they meet others there."""
    if len({tensor.is_meta for tensor in given}) < 2:
        return args, kwargs
    moved: Arguments = trees.map_leaves(
        lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) and leaf.dim() else leaf, (tuple(args), kwargs)
    )
    return moved


def _force_generators(high: bool) -> None:
    """Let Python's and numpy's global generators put out 300 numbers that are almost 0, or almost 1."""
    words = (_HIGH if high else _LOW,) * _FORCED + _REST
    random.setstate((3, (*words, 0), None))
    if (numpy := sys.modules.get("numpy")) is not None:
        with suppress(ValueError):  # another kind of generator was put in the place of numpy's
            numpy.random.set_state(("MT19937", words, 0))
