"""Hooks that a user puts on modules inside of a branch see all rows, and a backward for each forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rdp
from laws import architectures as arch
from laws.strategies import Case
from laws.training import identical, loss

CASES = [
    Case(arch.BlockMLP, (("plain", "norm", "plain"),), decay="constant", seed=1),
    Case(arch.Transformer, ("pre_norm", 2), decay="constant", seed=1),
    Case(arch.Transformer, ("tuple_attention", 2), decay="constant", seed=1),
]
KINDS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


def inside(model: nn.Module, handle: rdp.ResidualDropPath) -> dict[str, nn.Linear]:
    """The linear layers that hold parameters of branches."""
    names = dict.fromkeys(name.rpartition(".")[0] for b in handle.branches for name in b.parameters)
    return {name: m for name in names if isinstance(m := model.get_submodule(name), nn.Linear)}


def count_rows(model: nn.Module, handle: rdp.ResidualDropPath, kind: str, seen: list[int]) -> list[Any]:
    def hook(module: nn.Module, *given: Any) -> None:
        seen.append(len(given[0][0]))

    return [getattr(layer, kind)(hook) for layer in inside(model, handle).values()]


def train(model: nn.Module, handle: rdp.ResidualDropPath, steps: int) -> None:
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.05))
    for number in range(steps):
        optimizer.zero_grad()
        loss(model(model.rows(6, number))).backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.arguments[0]))
def test_one_that_takes_the_place_of_another_is_noticed(case):
    model, seen = case.model(), []
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    other = model.head.register_forward_hook(lambda *_: None)
    train(model, handle, 2)
    other.remove()
    for another in count_rows(model, handle, "register_forward_hook", seen)[:-1]:
        another.remove()
    train(model, handle, 4)
    assert set(seen) == {6}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.arguments[0]))
def test_they_see_all_rows_and_the_table_says_so(case, kind, when):
    model, twin, seen = case.model(), case.model(), []
    inputs = model.rows(2, 0)
    handle = case.attach(model, example_inputs=inputs)
    assert "rows" in {branch.compute for branch in handle.branches}
    if when == "before":
        handle.remove()
        count_rows(model, handle, kind, seen)
        handle = case.attach(model, example_inputs=inputs)
    else:
        train(model, handle, 2)
        count_rows(model, handle, kind, seen)
    seen.clear()
    train(model, handle, 4)
    assert set(seen) == {6}
    hooked = {name for name, _ in inside(model, handle).items()}
    for branch in handle.branches:
        if any(name.rpartition(".")[0] in hooked for name in branch.parameters):
            assert branch.compute == "dense"
            assert "dense: a hook on `" in branch.note
            assert "` would see some of the rows" in branch.note
    assert handle.check().ok
    dense = case.attach(twin, compute="dense", example_inputs=inputs)
    train(twin, dense, 6 if when == "after" else 4)
    if when == "before":
        assert identical(dict(model.state_dict()), dict(twin.state_dict()))


class Ended(nn.Module):
    """A block whose branch ends in a module without parameters, as in timm."""

    def __init__(self, width: int, ends: bool) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop_path = nn.Identity() if ends else None

    def forward(self, x: Tensor) -> Tensor:
        f = self.fc2(self.fc1(self.norm(x)).tanh())
        return x + (f if self.drop_path is None else self.drop_path(f))


def ended(width: int, depth: int, ends: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), *(Ended(width, ends) for _ in range(depth)), nn.Linear(width, 3)).double()


def by_sample(model: nn.Module) -> dict[str, list[Tensor]]:
    """What Opacus' hooks do: keep what a linear layer takes, and make gradients by sample in the backward."""
    gradients: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            taken: list[Tensor] = []

            def forward(module: nn.Module, args: Any, output: Any, taken: list[Tensor] = taken) -> None:
                if torch.is_grad_enabled():
                    taken.append(args[0].detach())

            def backward(module: nn.Module, _: Any, given: Any, name: str = name, taken: list[Tensor] = taken) -> None:
                gradient = torch.einsum("no,ni->noi", given[0], taken.pop())
                # Gradients of a batch are there when a backward has come to each of its forwards.
                if not taken:
                    gradients.setdefault(f"{name}.weight", []).append(gradient)

            layer.register_forward_hook(forward)
            layer.register_full_backward_hook(backward)
    return gradients


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("mode", "compute"), [("row", "auto"), ("row", "dense"), ("batch", "auto")])
@pytest.mark.parametrize("shape", [(4, 2), (6, 3), (8, 4)])
def test_gradients_by_sample_sum_up_to_the_gradient(shape, mode, compute):
    model = ended(*shape)
    gradients = by_sample(model)
    handle = rdp.attach(
        model, 0.5, mode=mode, decay="constant", compute=compute, example_inputs=torch.randn(2, 5).double()
    )
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    for number in range(8):
        optimizer.zero_grad()
        gradients.clear()
        loss(model(torch.randn(2 + number, 5).double())).backward()
        for name, p in model.named_parameters():
            if name in gradients:
                (by_row,) = gradients[name]
                assert len(by_row) == 2 + number
                torch.testing.assert_close(by_row.sum(0), torch.zeros_like(p) if p.grad is None else p.grad)
        assert len(gradients) == 2 + 2 * shape[1], "each layer had its backward"
        optimizer.step()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("shape", [(4, 2), (6, 3), (8, 4)])
def test_gradients_by_sample_of_a_layer_that_ends_a_branch_are_refused(shape, when):
    model = ended(*shape, ends=False)
    example = torch.randn(2, 5).double()
    if when == "before":
        by_sample(model)
    else:
        rdp.attach(model, 0.5, decay="constant", example_inputs=example)
        by_sample(model)
    with pytest.raises(rdp.AttachError, match=r"`1\.fc2` ends a branch and has hooks that pair its forwards with"):
        model(example) if when == "after" else rdp.attach(model, 0.5, decay="constant", example_inputs=example)
