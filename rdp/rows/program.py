"""A branch as a short program that can be run on any rows: module calls and a few functions of the adding module.

It begins with a module. What functions make of x before that (a shift, a partition into windows) they make of all rows,
in the model's own forward, as they would without us.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rdp import trees
from rdp.branches import RowAxis
from rdp.discovery.records import Arguments, Ref
from rdp.rows.arguments import Leaves
from rdp.rows.cost import Work
from rdp.trees import Path


@dataclass(frozen=True)
class Operation:
    """One module call or function call.

    Attributes:
        target: Qualified name of a module, or a function.
        arguments: With `Ref` for values of this program and `Rows`, `Named`, `Outside` for the rest.
        leaves: The same, by the keys that lead to each.
        taken: The values among them, each with these keys.
        outputs: The values that its output tensors are; None for those not needed.
        unhooked: A module that cannot be called otherwise, since it is a function of one tensor: Dropout, which passes
            it through in eval mode, or an activation, which may be called elsewhere, too.
    """

    target: str | Callable[..., Any]
    arguments: Arguments
    outputs: tuple[int | None, ...]
    unhooked: bool = False
    leaves: Leaves = field(init=False, repr=False)
    taken: Mapping[int, Path] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        leaves = trees.leaves(self.arguments)
        object.__setattr__(self, "leaves", leaves)
        object.__setattr__(self, "taken", {leaf.value: p for p, leaf in leaves.items() if isinstance(leaf, Ref)})


@dataclass(frozen=True)
class Program:
    """F of `y = shortcut(x) + F(x)`, from the value `start` to the value `result`.

    Attributes:
        start: What the first module takes: x, or what functions made of it.
        result: The value F(x).
        operations: What leads from one to the other; the first is a module call, and each uses only what the latest
            module call before it has returned.
        axes: Where the values that modules take and return have their rows.
        shape: Of the value `start`, when the branch was found.
        result_leaf: Which of the output tensors of the module that ends the branch the result is.
        batch_norm: Is there a batch normalisation, whose statistics are then those of the rows that run together?
        work: What a row takes.
        fewest: The fewest rows of a batch with which it gains from running on some of them.
        why_not_before: Why it does not begin with an earlier module of the branch, if there is one.
        kind: The functions that were called, in its modules too, and the classes of these.
    """

    start: int
    result: int
    operations: tuple[Operation, ...] = field(repr=False)
    axes: Mapping[int, RowAxis] = field(repr=False)
    shape: tuple[int, ...]
    result_leaf: int
    batch_norm: bool = False
    kind: tuple[str, ...] = field(default=(), repr=False)
    why_not_before: str = field(default="", repr=False)
    work: Work = field(default=Work(), repr=False)
    fewest: int = 0

    @property
    def entry(self) -> str:
        """The first module."""
        return str(self.operations[0].target)

    @property
    def later_modules(self) -> list[str]:
        """The other modules that are called, in order, but for those that cannot be called otherwise."""
        return [
            operation.target
            for operation in self.operations[1:]
            if isinstance(operation.target, str) and not operation.unhooked
        ]

    @property
    def fits_any_shape(self) -> bool:
        """Are there nothing but module calls? Arguments of functions may depend on shapes."""
        return all(isinstance(operation.target, str) for operation in self.operations)


def draws_random_numbers(model: nn.Module, program: Program) -> bool:
    """Has a module of the branch a dropout probability above 0? Then it would draw fewer numbers on fewer rows."""
    for name in [operation.target for operation in program.operations if isinstance(operation.target, str)]:
        for module in model.get_submodule(name).modules():
            # Attention passes a float of its own to the function, so modules of class Dropout are not all there is.
            chances = [value for key, value in vars(module).items() if "drop" in key.lower()]
            chances += [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
            if any(isinstance(chance, float) and chance > 0 for chance in chances):
                return True
    return False
