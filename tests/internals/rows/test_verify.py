"""A program is compared with what the model computes, and whatever is found, the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws.training import anatomy
from torch import Tensor, nn

from internals.rows.hand_made import FOLD, WIDTH, Net, inputs, program
from rdp.discovery.records import Ref
from rdp.rows.program import Operation, Program
from rdp.rows.verify import verify_programs


class Nets(nn.Module):
    """Several of them, one after another."""

    def __init__(self, **nets: Net) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        for net in self.nets.values():
            x = net(x, mask, table)
        return x


def of(name: str, kind: str = "", **changes: Any) -> Program:
    """The program of the net called `name`."""
    by_hand = program(**changes)
    prefix = f"nets.{name}."
    operations = []
    for operation in by_hand.operations:
        target = prefix + operation.target if isinstance(operation.target, str) else operation.target
        arguments = operation.arguments
        if operation.target is torch.mul:
            arguments = ((arguments[0][0], type(arguments[0][1])(f"{prefix}gain")), {})
        operations.append(Operation(target, arguments, operation.outputs))
    return program(**changes | {"operations": tuple(operations), "kind": (kind or name,)})


def verify(model: nn.Module, programs: dict[str, Program]) -> dict[str, str]:
    model.eval()
    before = anatomy(model)
    buffers = [buffer.tolist() for buffer in model.buffers() if not buffer.is_meta]
    failed = verify_programs(model, (inputs(2), {}), programs)
    assert anatomy(model) == before
    assert [buffer.tolist() for buffer in model.buffers() if not buffer.is_meta] == buffers
    return failed


def test_a_program_that_computes_what_the_model_computes_is_right():
    assert verify(Nets(a=Net(), b=Net()), {"nets.a.second": of("a"), "nets.b.second": of("b")}) == {}


@pytest.mark.parametrize("odd", ["a", "b"])
def test_a_branch_that_computes_something_else_is_found_out_alone(odd):
    model = Nets(**{name: Net(torch.sin if name == odd else torch.tanh) for name in "ab"})
    failed = verify(model, {f"nets.{name}.second": of(name) for name in "ab"})
    assert failed == {f"nets.{odd}.second": "its rows influence each other"}


def test_rows_that_meet_in_the_models_own_code_are_found_out():
    model = Nets(a=Net(lambda h: torch.tanh(h) - torch.tanh(h).mean(0)))
    assert verify(model, {"nets.a.second": of("a")}) == {"nets.a.second": "its rows influence each other"}


def test_a_branch_that_is_called_in_another_way_is_found_out():
    first, *others = program().operations
    otherwise = Operation("first", ((Ref(0), None), {}), first.outputs)
    failed = verify(Nets(a=Net()), {"nets.a.second": of("a", operations=(otherwise, *others))})
    assert failed == {"nets.a.second": "it is called otherwise than when it was traced"}


def test_a_branch_that_cannot_run_on_some_rows_does_not_keep_others_from_being_verified():
    def fixed(h: Tensor) -> Tensor:
        return torch.tanh(h).view(2 * FOLD, WIDTH)

    model = Nets(a=Net(), b=Net(fixed), c=Net(torch.sin))
    assert verify(model, {f"nets.{name}.second": of(name) for name in "abc"}) == {
        "nets.b.second": "a forward on some rows raised RuntimeError",
        "nets.c.second": "its rows influence each other",
    }


def test_the_first_of_a_kind_stands_for_all():
    model = Nets(a=Net(torch.sin), b=Net(), c=Net(torch.sin))
    kinds = {"a": "one", "b": "one", "c": "another"}
    failed = verify(model, {f"nets.{name}.second": of(name, kind) for name, kind in kinds.items()})
    assert failed == dict.fromkeys([f"nets.{name}.second" for name in "abc"], "its rows influence each other")


def test_without_numbers_nothing_is_verified():
    failed = verify(Nets(a=Net()).to("meta"), {"nets.a.second": of("a")})
    assert failed == {"nets.a.second": "not verified on meta tensors"}
