"""What is written down of a traced branch; why some cannot be is in `models/test_dense_reasons.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internals.rows.hand_made import Net, inputs, program
from rdp import trees
from rdp.discovery.find import find_branches, traced
from rdp.discovery.forwards import undisturbed
from rdp.discovery.records import Ref
from rdp.inputs import candidates
from rdp.rows.program import Operation, Program
from rdp.rows.twins import Twins
from rdp.rows.writer import branch_programs

DIM = 4


def written(model: nn.Module, *args: Tensor) -> list[Program]:
    """The programs of the branches of a model, in forward order."""
    with undisturbed(model):
        rows = next(iter(candidates(model, (args, {}))))
        pair, single = (rows.take((args, {}), number) for number in (2, 1))
        graph, alone = next(traced(model, pair, single))
        accepted = find_branches(graph, model).accepted
        twins = Twins(graph, alone)
        return [next(branch_programs(graph, twins, model, c.residuals[0], c.seams[0])) for c in accepted]


def renumbered(program: Program) -> dict[str, Any]:
    """All that a program says, with values numbered in the order in which they come up."""
    numbers = {program.start: 0}

    def number(leaf: Any) -> Any:
        return Ref(numbers[leaf.value]) if isinstance(leaf, Ref) else leaf

    operations = []
    for operation in program.operations:
        arguments = trees.map_leaves(number, operation.arguments)
        made = [None if v is None else numbers.setdefault(v, len(numbers)) for v in operation.outputs]
        operations.append(Operation(operation.target, arguments, tuple(made), operation.unhooked))
    return {
        "operations": operations,
        "result": numbers[program.result],
        "axes": {numbers[value]: axis for value, axis in program.axes.items()},
        "shape": program.shape,
        "result_leaf": program.result_leaf,
    }


class NormFree(Net):
    """Without the batch normalisation, which is not written down by default."""

    def __init__(self) -> None:
        super().__init__()
        self.second.norm = nn.Identity()


def test_a_branch_is_written_as_it_would_be_by_hand():
    (ours,) = written(NormFree(), *inputs(5))
    by_hand = renumbered(program())
    by_hand["operations"][1] = Operation(Tensor.mul, by_hand["operations"][1].arguments, (2,))  # as `*` is recorded
    assert renumbered(ours) == by_hand
    assert (ours.entry, ours.later_modules, ours.fits_any_shape) == ("first", ["second"], False)


class Block(nn.Module):
    def __init__(self, branch: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.gain = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self, x)


def linear() -> nn.Linear:
    return nn.Linear(DIM, DIM)


def targets(program: Program) -> list[str]:
    return [
        operation.target if isinstance(operation.target, str) else operation.target.__name__
        for operation in program.operations
    ]


def block(branch: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> Program:
    (only,) = written(Block(branch, **layers), torch.randn(3, DIM))
    return only


def test_modules_alone_fit_any_shape():
    program = block(lambda s, x: s.g(s.f(x)), f=linear(), g=linear())
    assert targets(program) == ["f", "g"]
    assert program.fits_any_shape


def test_functions_before_the_first_module_are_left_to_the_model():
    program = block(lambda s, x: s.g(s.f(x.tanh().exp()).tanh()), f=linear(), g=linear())
    assert targets(program) == ["f", "tanh", "g"]


def test_a_parameter_in_another_form_is_made_again():
    program = block(lambda s, x: s.g(s.f(x) * s.gain.exp()), f=linear(), g=linear())
    assert targets(program) == ["f", "exp", "mul", "g"]


@pytest.mark.parametrize("names", [["f", "dropout", "g"], ["f", "g", "dropout"]])
def test_modules_that_pass_their_input_through_in_eval_mode_are_steps_all_the_same(names):
    def branch(s: Any, x: Tensor) -> Tensor:
        for name in names:
            x = getattr(s, name)(x)
        return x

    program = block(branch, f=linear(), g=linear(), dropout=nn.Dropout(0.5))
    assert targets(program) == names
    assert [operation.unhooked for operation in program.operations] == [name == "dropout" for name in names]
    assert program.later_modules == ["g"]


def test_but_not_before_the_first_module_which_takes_what_they_return():
    program = block(lambda s, x: s.f(s.dropout(x)), f=linear(), dropout=nn.Dropout(0.5))
    assert targets(program) == ["f"]


class Scales(nn.Module):
    """Passes its input through but for training."""

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x * factor if self.training else x


def test_but_one_that_takes_something_else_may_be_called_otherwise():
    program = block(lambda s, x: s.g(s.scale(s.f(x), 0.5)), f=linear(), g=linear(), scale=Scales())
    assert targets(program) == ["f", "scale", "g"]
    assert program.later_modules == ["scale", "g"]


def test_branches_of_one_kind_are_the_same_functions_and_classes():
    blocks = [
        Block(lambda s, x: s.g(s.f(x).exp()), f=linear(), g=linear()),
        Block(lambda s, x: s.g(s.f(x).exp()), f=linear(), g=linear()),
        Block(lambda s, x: s.g(s.f(x).tanh()), f=linear(), g=linear()),
        Block(lambda s, x: s.g(s.f(x)), f=linear(), g=nn.Tanh()),
        Block(lambda s, x: s.g(s.f(x)), f=linear(), g=nn.Sequential(nn.Tanh())),
    ]
    kinds = [program.kind for program in written(nn.Sequential(*blocks), torch.randn(3, DIM))]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 4
