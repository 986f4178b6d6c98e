"""What stands where a module was that served nothing but removed branches: it has no parameters and computes nothing.

The code of the model around it goes on to call it, so it returns zeros of the form and shape of what the module
returned; the shape follows that of its input, since batches and images differ in size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


class NoForm(Exception):
    """Why nothing can stand for a module."""


@dataclass(frozen=True)
class Axis:
    """The length of an axis: `up / down` times, rounded up, that of axis `like` of the input; or a constant."""

    like: int | None
    up: int = 1
    down: int = 1


@dataclass(frozen=True)
class Zeros:
    """Stands for a tensor that is returned.

    Attributes:
        axes: How long its axes are; None: as those of the input.
        dtype: None: that of the input.
    """

    axes: tuple[Axis, ...] | None
    dtype: torch.dtype | None

    def of(self, x: Tensor) -> Tensor:
        """The tensor for an input."""
        if self.axes is None:
            return torch.zeros_like(x, dtype=self.dtype)
        shape = [a.up if a.like is None else -(-x.shape[a.like] * a.up // a.down) for a in self.axes]
        return x.new_zeros(shape, dtype=self.dtype)


@dataclass(frozen=True)
class Same:
    """Stands for the input, which is returned: of a block without its branch, or what is not looked at any more."""

    copied: bool

    def of(self, x: Tensor) -> Tensor:
        """The tensor for an input; what is looked at is copied, since it may be written to."""
        return x.clone() if self.copied else x


@dataclass(frozen=True)
class Form:
    """How a module was called, and what it returned.

    Attributes:
        source: Position or keyword of its first tensor argument.
        returned: With `Zeros` or `Same` in the places of tensors.
    """

    source: int | str
    returned: Any


class Removed(nn.Module):
    """A module that is not there any more.

    Args:
        module: That was.
        form: Of its calls.
    """

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.form = form
        self.was = type(module).__name__
        for name in module._parameters:
            self.register_parameter(name, None)
        # Code around it may ask for settings of what was there, but for nothing that holds numbers.
        self.__dict__ |= {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN) and k not in self.__dict__}
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like what was returned."""
        source = self.form.source
        return _filled(self.form.returned, args[source] if isinstance(source, int) else kwargs[source])

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return self.was


def source_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """The first tensor argument of a call, and its position or keyword.

    Raises:
        NoForm: If there is none.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, Tensor):
            return key, value
    raise NoForm("it takes no tensor")


def form_of(x: Tensor, output: Any, must_be_zero: Callable[[int], bool]) -> Any:
    """The form of what a module returned.

    Args:
        x: Its input.
        output: What it returned.
        must_be_zero: Of output tensor number k; else it may be anything of that shape, and x too.

    Raises:
        NoForm: If that cannot be made up.
    """
    numbers = itertools.count()

    def form(value: Any) -> Any:
        if isinstance(value, Tensor):
            like = _zeros(x, value)
            return like if must_be_zero(next(numbers)) or like != Zeros(None, None) else Same(copied=False)
        if type(value) in (tuple, list):
            return type(value)(form(item) for item in value)
        if type(value) is dict:
            return {key: form(item) for key, item in value.items()}
        if isinstance(value, _PLAIN):
            return value
        raise NoForm(f"it returns a {type(value).__name__}")

    return form(output)


def _zeros(x: Tensor, out: Tensor) -> Zeros:
    dtype = None if out.dtype == x.dtype else out.dtype
    if out.shape == x.shape:
        return Zeros(None, dtype)
    axes = []
    for axis, length in enumerate(out.shape):
        given = x.shape[axis] if axis < x.dim() else 0
        if given and length and length % given == 0:
            axes.append(Axis(axis, length // given))
        elif given and length and -(-given // round(given / length)) == length:
            axes.append(Axis(axis, 1, round(given / length)))  # strides: their kernels' padding rounds up
        else:
            axes.append(Axis(None, length))
    return Zeros(tuple(axes), dtype)


def _filled(form: Any, x: Tensor) -> Any:
    if isinstance(form, (Zeros, Same)):
        return form.of(x)
    if isinstance(form, tuple):
        return tuple([_filled(item, x) for item in form])
    if isinstance(form, list):
        return [_filled(item, x) for item in form]
    if isinstance(form, dict):
        return {key: _filled(item, x) for key, item in form.items()}
    return form
