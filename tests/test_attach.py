"""What `rdp.attach` refuses, word by word, and which branches it gates."""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import timm.layers
import torch
from laws.architectures import BlockMLP, FoldedMLP, LoopMLP
from laws.strategies import Case
from laws.training import anatomy
from torch import Tensor, nn

import rdp

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def message(error: type[Exception], *args: Any, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        rdp.attach(*args, **changes)
    return str(caught.value)


# -- models -----------------------------------------------------------------------------------------------------------


def test_what_is_no_module():
    text = message(rdp.ArgumentError, torch.relu)
    assert text == "model must be a torch.nn.Module; got builtin_function_or_method"


def test_data_parallel():
    assert message(rdp.AttachError, nn.DataParallel(CASE.model())) == (
        "torch.nn.DataParallel copies the model into threads, where masks cannot follow. Use DistributedDataParallel, "
        "or attach to model.module and train that"
    )


def test_a_scripted_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    assert message(rdp.AttachError, scripted) == (
        "a scripted model runs no Python hooks. Attach to the model before torch.jit.script"
    )


@pytest.mark.parametrize(
    ("paths", "listed"),
    [
        (2, "0.drop_prob = 0.5, 1.drop_prob = 0.5"),
        (8, ", ".join(f"{i}.drop_prob = 0.5" for i in range(8))),
        (9, ", ".join(f"{i}.drop_prob = 0.5" for i in range(8)) + " and 1 more"),
    ],
)
def test_a_model_that_drops_paths_by_itself(paths, listed):
    model = nn.Sequential(*(timm.layers.DropPath(0.5) for _ in range(paths)))
    assert message(rdp.NativeDropPathError, model) == (
        f"Sequential drops paths by itself, and both together would drop more than either: {listed}. Build it with a "
        "drop path rate of 0, or pass native='off' to silence these until handle.remove()"
    )
    with rdp.attach(model, native="off"):
        assert [path.drop_prob for path in model] == [0] * paths
    assert [path.drop_prob for path in model] == [0.5] * paths


@pytest.mark.parametrize(("part", "where"), [("", "it"), ("body.1", "its module `body.1`")])
def test_a_model_with_the_hooks_of_another_handle(part, where):
    model = CASE.model()
    with rdp.attach(model.get_submodule(part)):
        assert message(rdp.AttachError, model) == (
            f"this BlockMLP is attached already ({where} has another handle's hooks); call remove() on that handle "
            "first"
        )
    rdp.attach(model).remove()


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("body.0.fc3", "; did you mean 'body.0.fc2' or 'body.0.fc1' or 'body.2.fc2'?"),
        ("nothing like it", ""),
    ],
)
def test_a_name_of_no_module(name, hint):
    text = message(rdp.BranchError, CASE.model(), branches=["body.1", name])
    assert text == f"branches names {name!r}, which is no module of BlockMLP{hint}"


class Net(nn.Module):
    """Four layers, and what its forward makes of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def two_and_a_leak(s: Any, x: Tensor) -> Tensor:
    """Branches b and c; what d returns is used elsewhere, too."""
    x = s.a(x)
    x = x + s.b(x)
    x = x + s.c(x)
    x = x + (d := s.d(x))
    return x * d.sigmoid()


def only_a_leak(s: Any, x: Tensor) -> Tensor:
    x = s.a(x)
    x = x + (d := s.d(x))
    return x * d.sigmoid()


def two_nonlinear(s: Any, x: Tensor) -> Tensor:
    x = x + s.a(x)
    x = x + torch.relu(s.b(x))
    return x + torch.relu(s.c(x))


X = torch.randn(3, 4)
LEAK = "`d`: the output of `d` also feeds something other than the residual sum"


def test_what_cannot_be_gated_is_told_at_the_line_that_called():
    with pytest.warns(rdp.RdpWarning) as caught:
        rdp.attach(Net(two_and_a_leak), example_inputs=X)
    assert [str(warning.message) for warning in caught] == [
        f"1 residual sums are left ungated and train plainly: {LEAK}. Name the modules to gate in branches= if you "
        "know better"
    ]
    assert "rdp.attach(Net(two_and_a_leak)" in linecache.getline(caught[0].filename, caught[0].lineno)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chosen", [["b", "d"], lambda name, module: name == "b" and isinstance(module, nn.Linear)])
def test_who_chooses_is_told_nothing_and_gets_what_was_chosen(chosen):
    """What was named is gated although it was refused, and the rates are those of what was chosen."""
    handle = rdp.attach(Net(two_and_a_leak), 0.4, branches=chosen, example_inputs=X)
    expected = ["b", "d"] if isinstance(chosen, list) else ["b"]
    assert [(branch.name, branch.rate) for branch in handle.branches] == [(name, 0.4) for name in expected]
    assert handle.refused == ()


def test_a_predicate_is_asked_of_every_branch_that_was_found():
    asked: dict[str, nn.Module] = {}
    net = Net(two_and_a_leak)

    def choose(name: str, module: nn.Module) -> bool:
        asked[name] = module
        return True

    rdp.attach(net, branches=choose, example_inputs=X)
    assert asked == {"b": net.b, "c": net.c}


def test_rows_that_influence_each_other_are_told_in_row_mode():
    def forward(s: Any, x: Tensor) -> Tensor:
        x = x + s.a(x)
        h = s.c(x)
        return x + s.b(h - h.mean(0, keepdim=True))

    with pytest.warns(rdp.RdpWarning) as caught:
        rdp.attach(Net(forward), example_inputs=X)
    assert [str(warning.message) for warning in caught] == [
        "the rows of a batch influence each other even in eval mode, first in `b`: is the first axis of the input the "
        "batch? If not, use mode='batch'"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rdp.attach(Net(forward), mode="batch", example_inputs=X)


@pytest.mark.filterwarnings("error")
def test_branches_that_cannot_be_rescaled():
    assert message(rdp.BranchError, Net(two_nonlinear), scale_by_keep=True, example_inputs=X) == (
        "scale_by_keep=True needs branches whose ends commute with rescaling; a nonlinear function follows b, c. Use "
        "scale_by_keep=False, or leave these out with branches="
    )
    rdp.attach(Net(two_nonlinear), example_inputs=X)
    rdp.attach(Net(two_nonlinear), scale_by_keep=True, branches=["a"], example_inputs=X)
    handle = rdp.attach(Net(two_nonlinear), 0.0, scale_by_keep=True, example_inputs=X)  # which rescales nothing
    with pytest.raises(rdp.BranchError, match="a nonlinear function follows b, c"):
        handle.rate = 0.1
    assert handle.rate == 0


def test_a_named_module_that_returned_nothing():
    net = Net(lambda s, x: x + s.a(x))
    assert message(rdp.BranchError, net, branches=["b", "a"], example_inputs=X) == (
        "branches names 'b', which returned no tensor in a forward of Net and cannot be gated"
    )


WAY_OUT = ". If the model has residual branches, name the modules that end them in branches="


@pytest.mark.parametrize(
    ("forward", "chosen", "looked_at"),
    [
        (lambda s, x: s.a(x), None, f"0 additions were looked at{WAY_OUT}"),
        (lambda s, x: s.a(x) + 1, None, f"1 additions were looked at (1x adds a constant){WAY_OUT}"),
        (only_a_leak, None, f"1 additions were looked at; refused: {LEAK}{WAY_OUT}"),
        (only_a_leak, lambda name, module: True, f"1 additions were looked at; refused: {LEAK}{WAY_OUT}"),
        (
            two_and_a_leak,
            lambda name, module: False,
            "3 additions were looked at, and branches= chose none of b, c",
        ),
    ],
)
def test_nothing_to_gate(forward, chosen, looked_at):
    text = message(rdp.BranchError, Net(forward), branches=chosen, example_inputs=X)
    assert text == f"no residual branch to gate in Net: {looked_at}"


# -- inputs -----------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.body = LoopMLP(2)
        self.body.stem = nn.Identity()

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> Tensor:
        x = self.a(x)
        return self.body(x if other is None else x + self.b(other))


@pytest.mark.parametrize(
    "example",
    [torch.randn(2, 3), (torch.randn(2, 3),), {"x": torch.randn(2, 3), "other": torch.randn(2, 2)}],
    ids=["tensor", "tuple", "dict"],
)
def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(example):
    handle = rdp.attach(TwoInputs(), rate=0.1, example_inputs=example)
    assert [branch.name for branch in handle.branches] == ["body.layers.0", "body.layers.1"]


def test_keyword_inputs_find_branches_at_the_first_forward_too():
    model = TwoInputs()
    handle = rdp.attach(model, rate=0.9, decay="constant")
    model.eval()(torch.randn(2, 3))
    assert handle.branches == ()  # that was no training forward
    output = model.train()(x=(x := torch.randn(5, 3)), other=(other := torch.randn(5, 2)))
    assert handle.masks.shape == (2, 5)
    handle.remove()
    assert not torch.equal(output, model(x=x, other=other))


def test_inference_mode_around_attach_does_not_last():
    model = CASE.model()
    x = model.rows(4, 0)
    with torch.inference_mode():
        handle = CASE.attach(model, example_inputs=x)
    assert len(handle.branches) == 3
    model(x).sum().backward()
    assert model.stem.weight.grad is not None


class Stubborn(nn.Linear):
    """Takes no hooks in training mode while `error` is set; branches are found in eval mode."""

    error: BaseException | None = None

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        if self.error is not None and self.training:
            raise self.error
        return super().register_forward_hook(*args, **kwargs)


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()], ids=["error", "interruption"])
def test_all_branches_are_hooked_or_none(error):
    """With some of the hooks, the other branches would train plainly."""
    model = CASE.model()
    model.body[1].fc2 = Stubborn(4, 4).double()
    handle = CASE.attach(model, compute="dense")
    model.body[1].fc2.error = error
    before = anatomy(model)
    with pytest.raises(type(error)):
        handle.discover(model.rows(2, 0))
    assert handle.branches == ()
    assert anatomy(model) == before
    model.body[1].fc2.error = None
    handle.discover(model.rows(2, 0))
    x = model.rows(4, 0)
    output, masks = model(x), handle.masks
    handle.remove()
    torch.testing.assert_close(output, CASE.oracle(model, x, masks, rdp.Phase.DROP))


@pytest.mark.parametrize("architecture", [LoopMLP, FoldedMLP, BlockMLP], ids=lambda kind: kind.__name__)
def test_attach_takes_as_long_for_one_more_branch_of_many_as_of_few(architecture):
    """Counted in calls of the library's functions."""

    def calls(blocks: int) -> int:
        torch.manual_seed(0)
        model = architecture(("plain",) * blocks if architecture is BlockMLP else blocks)
        count = 0

        def note(frame: FrameType, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call" and str(frame.f_globals.get("__name__")).startswith("rdp.")

        sys.setprofile(note)
        try:
            handle = rdp.attach(model, decay="constant", example_inputs=model.rows(2, 0))
        finally:
            sys.setprofile(None)
        assert len(handle.branches) == blocks
        return count

    calls(2)
    few, many = (calls(24) - calls(12)) / 12, (calls(96) - calls(48)) / 48
    assert many <= 1.05 * few  # where rows lie may want a second forward
