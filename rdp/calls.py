"""How a model is called: the names of its arguments, what a user gives for them, and what is told of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rdp import trees
from rdp.errors import ArgumentError, ForwardError, formed, listed

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments."""


def argument_names(model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Names of the arguments that a model's forward takes by position, and whether it takes others by name."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return (), True
    kinds = {parameter.kind for parameter in parameters}
    children = list(model.children())
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if not names and inspect.Parameter.VAR_POSITIONAL in kinds and len(children) == 1:
        return argument_names(children[0])  # a wrapper, which passes on what it is given
    return names, bool(kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})


def by_name(names: Sequence[str], inputs: Inputs) -> dict[object, Any]:
    """Every argument, by its name or, where it has none, by its number."""
    args, kwargs = inputs
    return dict(zip((*names[: len(args)], *range(len(names), len(args))), args, strict=True)) | dict(kwargs)


def given_as(names: Sequence[str], inputs: Inputs, key: object) -> Any:
    """The argument of this name or number; None if it is not given."""
    args, kwargs = inputs
    if key in kwargs:
        return kwargs[key]  # type: ignore[index]
    number = names.index(key) if isinstance(key, str) and key in names else key
    return args[number] if isinstance(number, int) and number < len(args) else None


def described(model: nn.Module, inputs: Inputs) -> str:
    """The arguments with their names and shapes, for a message."""
    given = by_name(argument_names(model)[0], inputs)
    named = [f"{name}: {formed(value)}" if isinstance(name, str) else formed(value) for name, value in given.items()]
    return listed(named) or "nothing"


def check_named(model: nn.Module, rows: str | None) -> None:
    """Refuse `rows=` where a model's forward takes no such argument.

    Raises:
        ArgumentError: With the arguments that it takes.
    """
    names, others = argument_names(model)
    if rows is not None and rows not in names and not others:
        raise ArgumentError(
            f"rows names {rows!r}, which is no argument of the forward of {type(model).__name__}; it takes "
            f"{listed(names) or 'none by name'}"
        )


def arguments_of(inputs: Any) -> Inputs:
    """Positional and keyword arguments of a forward, from what the user has given for them.

    Raises:
        ArgumentError: If a tensor in them was made in inference mode.
    """
    kwargs = inputs if isinstance(inputs, Mapping) else {}
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    if any(tensor.is_inference() for tensor in trees.tensors((args, kwargs))):
        raise ArgumentError(
            "example_inputs holds a tensor that was made under torch.inference_mode, which cannot be followed "
            "through the model; pass a clone() of it that is made outside"
        )
    return args, kwargs


class CallError(Exception):
    """A model raises `raised` when it is called with the inputs that were given."""

    def __init__(self, raised: Exception) -> None:
        super().__init__()
        self.raised = raised


@contextmanager
def calling() -> Iterator[None]:
    """The model is called in this context, with what was given, and nothing else is done.

    Raises:
        CallError: In the place of what it raises.
    """
    try:
        yield
    except Exception as error:
        raise CallError(error) from error


@contextmanager
def as_called() -> Iterator[None]:
    """Raise what the model raises, as its user would see it without us."""
    try:
        yield
    except CallError as error:
        raise error.raised from None


@contextmanager
def telling(model: nn.Module, inputs: Inputs, argument: str) -> Iterator[None]:
    """Say that it is `argument` which a model cannot be called with.

    Raises:
        ArgumentError: In the place of a `CallError` or a `ForwardError`.
    """
    meant = f"{argument} (of which a tuple is taken for positional and a dict for keyword arguments)"
    try:
        yield
    except ForwardError as error:
        raise ArgumentError(f"{meant}: {error}") from error.__cause__
    except CallError as error:
        own, called = error.raised, f"{type(model).__name__}, called with ({described(model, inputs)})"
        raise ArgumentError(f"{meant}: {called}, raises {type(own).__name__}: {str(own).strip()}") from own
