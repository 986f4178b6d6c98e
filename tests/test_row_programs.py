"""What a branch that runs on some of the rows may be made of: each is really run so, and is exact."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rdp

WIDTH = 8


class Masked(nn.Module):
    """A module in the middle takes a mask with an entry a row, by position or by keyword."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.by_keyword = by_keyword
        self.norm, self.mix, self.out = nn.LayerNorm(WIDTH), Mix(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out(self.mix(h, mask=mask) if self.by_keyword else self.mix(h, mask))


class MaskedFirst(nn.Module):
    """The first module takes the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = Mix(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.mix(x, mask)))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x) * mask[:, None, None]


class Windows(nn.Module):
    """Each row is four windows, which are rows of their own to the modules inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(WIDTH), nn.Linear(3 * WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        h = functional.gelu(self.mix(h.view(4 * h.shape[0], 3 * WIDTH)))
        return x + self.out(h.view(h.shape[0] // 4, 12, WIDTH))


class Scaled(nn.Module):
    """A parameter and a buffer of the block itself are used between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)) * self.gamma + self.shift)


class TokensFirst(nn.Module):
    """Rows along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.attend(self.norm(x).transpose(0, 1)).transpose(0, 1)
        return x + h


class Grouped(nn.Module):
    """Modules are told how many windows there are."""

    def __init__(self) -> None:
        super().__init__()
        self.mix1, self.mix2 = MixWindows(), MixWindows()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.mix1(x, 4 * x.shape[0])
        return x + self.mix2(h, 2 * h.shape[0])


class MixWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, windows: int) -> Tensor:
        h = torch.tanh(self.fc(x)).view(windows, -1, WIDTH)
        return (h - h.mean(1, keepdim=True)).view(x.shape)


class FunctionFirst(nn.Module):
    """The first module takes what functions make of x: windows that are rows of their own, also at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(3 * WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(x).reshape(-1, 3 * WIDTH)
        return x + self.out(functional.gelu(self.mix(h))).reshape(-1, 12, WIDTH)


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


def chain(block: Callable[[], nn.Module]) -> Chain:
    torch.manual_seed(0)
    return Chain(*(block() for _ in range(3))).double()


def batch(rows: int, tokens: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=generator)
    return x, torch.randn(rows, dtype=torch.float64, generator=generator)


def two_steps(model: nn.Module, handle: rdp.ResidualDropPath, *inputs: Tensor) -> list[Tensor | None]:
    """Outputs and gradients of a DROP and of a FREEZE step."""
    result = []
    x = inputs[0].clone().requires_grad_()
    for _ in range(2):
        output = model(x, *inputs[1:])
        output.square().sum().backward()
        result += [output.detach(), x.grad.clone()]
        result += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        x.grad = None
        handle.advance()
    return result


def compare(
    model: nn.Module,
    found_with: tuple[Tensor, ...],
    *batches: tuple[Tensor, ...],
    change: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """Several batches, on the rows that are needed and on all; `change` is made to the model after `attach`."""
    models = model, copy.deepcopy(model)
    options = {"decay": "constant", "seed": 2, "example_inputs": found_with}
    handles = [
        rdp.attach(model, 0.5, compute=how, **options) for model, how in zip(models, ("auto", "dense"), strict=True)
    ]
    assert {branch.compute for branch in handles[0].branches} == {"rows"}
    for each in models:
        change(each)
    for inputs in batches:
        ours, dense = (two_steps(*pair, *inputs) for pair in zip(models, handles, strict=True))
        for mine, theirs in zip(ours, dense, strict=True):
            torch.testing.assert_close(
                *(torch.zeros(()) if tensor is None else tensor for tensor in (mine, theirs)),
                check_dtype=mine is not None and theirs is not None,
            )


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(functools.partial(Masked, False), id="mask"),
        pytest.param(functools.partial(Masked, True), id="mask by keyword"),
        MaskedFirst,
        Windows,
        Grouped,
        FunctionFirst,
        Scaled,
        TokensFirst,
    ],
)
def test_exact_and_really_run_on_some_rows(block):
    compare(chain(block), batch(2), batch(6), batch(3), batch(1), batch(7))


@pytest.mark.parametrize("block", [functools.partial(Masked, False), Scaled, TokensFirst])
def test_other_numbers_of_tokens_than_when_the_branch_was_found(block):
    compare(chain(block), batch(2, 5), batch(6, 7), batch(6, 5), batch(4, 2))


class Mixed(nn.Module):
    """One module is called in another way once `otherwise` is set."""

    otherwise = ""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(WIDTH), Mix(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        if self.otherwise == "mask by keyword":
            h = self.mix(h, mask=mask)
        elif self.otherwise == "x by keyword":
            h = self.mix(x=h, mask=mask)
        else:
            h = self.mix(h, mask)
        return x + self.out(h)


def test_a_module_that_is_called_in_another_way_gets_all_rows():
    def otherwise(model: nn.Module) -> None:
        model.blocks[1].otherwise = "mask by keyword"

    compare(chain(Mixed), batch(2), batch(6), batch(3), change=otherwise)


def test_but_not_without_x():
    model = chain(Mixed)
    rdp.attach(model, 0.5, decay="constant", example_inputs=batch(2))
    model.blocks[0].otherwise = "x by keyword"
    with pytest.raises(rdp.ForwardError) as error:
        model(*batch(6))
    assert str(error.value) == (
        "`blocks.0.mix` is called with other arguments than when the branch was found, and x is not among them. Attach "
        "with compute='dense', or with example_inputs like this batch"
    )
