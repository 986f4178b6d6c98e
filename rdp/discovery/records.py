"""What a trace is made of: values, how each was made, and the calls of modules in which they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rdp import trees

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Ref(trees.Placeholder):
    """Stands for a value of the trace in recorded arguments."""

    value: int


@dataclass(frozen=True, eq=False, slots=True)
class Recipe:
    """How a value was made: output tensor number `leaf` of `func(*args, **kwargs)`."""

    func: Callable[..., Any]
    arguments: Arguments
    leaf: int


@dataclass(eq=False, slots=True)
class Call:
    """One call of one module. Times are numbers of values made so far."""

    name: str
    ordinal: int
    """How many calls of the same module came before it."""
    parent: Call | None
    begin: int
    end: int = 1 << 60
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    returns_tensor: bool = True
    arguments: Arguments = ((), {})

    def chain(self) -> Iterator[Call]:
        """This call, the call it was made in, and so on up to the model's."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(eq=False, slots=True)
class Value:
    """One tensor value; its `index` is also the time at which it was made."""

    index: int
    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    is_float: bool
    is_data: bool
    """Does it depend on the model's inputs? Biases, position embeddings and buffers do not."""
    owner: Call | None
    """The innermost module call that was running when it was made."""
    has_gradients: bool = True
    """Is it made outside of `torch.no_grad` and `torch.inference_mode`?"""
    parameter: str | None = None
    recipe: Recipe | None = None
    users: list[int] = field(default_factory=list)
    returned_by: list[Call] = field(default_factory=list)
