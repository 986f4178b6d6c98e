"""Keeping frozen parameters, and their state, where an optimizer moves what has no gradient.

To hide gradients is enough for optimizers that skip a parameter without one. Others take a missing gradient for zeros,
decay every weight, or move all parameters along one direction. Which kind an optimizer is of is seen, not known: in the
first steps that freeze something what is frozen is copied, and compared after the step. If it was touched it is put
back, then and in every later step; if not, only versions are compared from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rdp import trees

_EXAMINED = 4
"""Steps: in the first, what is frozen may have no momentum yet that could move it."""


class Keeper:
    """Puts back what an optimizer does to frozen parameters.

    Args:
        optimizer: The plain one.

    Attributes:
        moves_all: Has it touched a parameter without a gradient?
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.moves_all = isinstance(optimizer, LBFGS)  # along one direction, if anything is frozen sooner or later
        self._optimizer = optimizer
        self._steps = 0

    def keep(self, parameters: Collection[Tensor]) -> Kept:
        """Remember these parameters, which are frozen, before the optimizer moves any."""
        examined = self._steps < _EXAMINED
        self._steps += bool(parameters)
        if not (examined or self.moves_all):
            return Kept(self, parameters, [], certain=False)
        # LBFGS keeps the state of all parameters at the first, so it is not the state of any.
        state = {} if isinstance(self._optimizer, LBFGS) else self._optimizer.state
        copies = [Copy(p, state) for p in parameters]
        return Kept(self, parameters, copies, certain=self.moves_all)


class Kept:
    """What is remembered of the parameters during one step.

    Args:
        keeper: To be told if the optimizer moves them.
        parameters: What is frozen.
        copies: Of the parameters and their state, where the optimizer may move them.
        certain: Is it known to do so?

    Attributes:
        touched: Were frozen ones written to?
    """

    def __init__(self, keeper: Keeper, parameters: Iterable[Tensor], copies: list[Copy], certain: bool) -> None:
        self.touched = False
        self._keeper = keeper
        self._versions = [(p, p._version) for p in parameters]
        self._copies = copies
        self._certain = certain

    def put_back(self, frozen: Collection[int]) -> None:
        """Let the parameters with these ids, and their state, be as they were."""
        for copy, (parameter, version) in zip(self._copies, self._versions, strict=False):
            if id(parameter) in frozen and (self._certain or parameter._version != version or copy.differs()):
                copy.put_back()
                self.touched = self._keeper.moves_all = True

    def lost(self, frozen: Collection[int]) -> int:
        """How many parameters with these ids were written to that there are no copies of; from now on there are."""
        if self._copies:
            return 0
        moved = sum(parameter._version != version and id(parameter) in frozen for parameter, version in self._versions)
        self._keeper.moves_all |= moved > 0
        return moved


class Copy:
    """A copy of a parameter and its state.

    Args:
        parameter: The parameter.
        states: Of all parameters.
    """

    def __init__(self, parameter: Tensor, states: Any) -> None:
        self.parameter = parameter
        self._states = states
        state = states.get(parameter)
        self._containers = None if state is None else _containers_copied(state)
        self._leaves = trees.leaves(self._containers)
        self._tensors = [(x, x.detach().clone()) for x in _plain_tensors([parameter, *self._leaves.values()])]

    def differs(self) -> bool:
        """Has anything changed, to the bit?"""
        now, before = trees.leaves(self._states.get(self.parameter)), self._leaves
        return (
            now.keys() != before.keys()
            or not all(new is before[path] or _equal(before[path], new) for path, new in now.items())
            or not all(_same_bits(x, old) for x, old in self._tensors)
        )

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo all changes."""
        for tensor, old in self._tensors:
            tensor.copy_(old)
        if self._containers is None:
            self._states.pop(self.parameter, None)
        else:
            state = self._states[self.parameter]
            state.clear()
            state.update(_containers_copied(self._containers))


def _plain_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, and in place of such as DTensors what they consist of."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            yield from _plain_tensors(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, Tensor):
            yield value


def _containers_copied(value: Any) -> Any:
    """The same leaves in new dicts and lists."""
    if type(value) is dict:
        return {key: _containers_copied(item) for key, item in value.items()}
    return [_containers_copied(item) for item in value] if type(value) is list else value


def _equal(a: Any, b: Any) -> bool:
    """Of state that was replaced: is it the same number? A new tensor is not compared with the old one."""
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:
        return True
    if a.layout is not torch.strided or a.is_quantized:
        return torch.equal(a.to_dense(), b.to_dense())
    return torch.equal(*(x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b)))
