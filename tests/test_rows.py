"""What a branch that runs on some of the rows may be made of: each is run so, and equals Algorithm 1 written out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws.training import after_forward
from torch import Tensor, nn
from torch.nn import functional

import rdp

WIDTH, TOKENS = 8, 12


class Block(nn.Module):
    """Adds `branch(self, x, mask)` to x; its last module is `out`."""

    how = ""

    def __init__(self, branch: Callable[[Any, Tensor, Tensor | None], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.gamma = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.branch(self, x, mask)


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if mask is None else block(x, mask)
        return x

    def oracle(self, masks: Tensor, phase: rdp.Phase, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Algorithm 1."""
        for block, keep in zip(self.blocks, masks, strict=True):
            m, f = keep.view(-1, *[1] * (x.dim() - 1)).to(x.dtype), block.branch(block, x, mask)
            x = x + (m * f if phase is rdp.Phase.DROP else m * f.detach() + (1 - m) * f)
        return x


class Mix(nn.Module):
    """A linear layer that may take a number for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fc(x) if mask is None else self.fc(x) * mask[:, None, None]


class MixWindows(nn.Module):
    """Centres each of as many windows as it is told that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, windows: int) -> Tensor:
        h = torch.tanh(self.fc(x)).view(windows, -1, WIDTH)
        return (h - h.mean(1, keepdim=True)).view(x.shape)


ACTIVATION = nn.Tanh()


def linear(windows: int = 1) -> nn.Linear:
    return nn.Linear(windows * WIDTH, windows * WIDTH)


def windows_inside(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    h = s.norm(x)
    h = functional.gelu(s.mix(h.view(4 * h.shape[0], 3 * WIDTH)))
    return s.out(h.view(h.shape[0] // 4, TOKENS, WIDTH))


def numbers_of_windows(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    h = s.mix(x, 4 * x.shape[0])
    return s.out(h, 2 * h.shape[0])


def shifted_windows(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """As in Swin v2, before any module."""
    h = torch.roll(x * s.gamma, 1, dims=1).reshape(-1, 2, WIDTH)
    return s.out(torch.roll(s.mix(h.flatten(1)).view(-1, x.shape[1], WIDTH), -1, dims=1))


def otherwise(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """One module is called in another way once `how` is set."""
    h = s.norm(x)
    if s.how == "mask by keyword":
        return s.out(s.mix(h, mask=mask))
    return s.out(s.mix(x=h, mask=mask) if s.how == "x by keyword" else s.mix(h, mask))


def by_a_module(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """As in the residual blocks of diffusion models."""
    h = s.mix(s.norm(x))
    assert mask is not None
    shift, scale = s.embed(torch.tanh(mask)[:, None, None].expand(-1, 1, WIDTH)).chunk(2, dim=-1)
    return s.out(torch.tanh(h * (1 + scale) + shift))


def shared_activation(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return s.act(s.out(s.act(s.mix(s.act(s.norm(x))))))


def shape_from_before(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return s.out(s.norm(x).flatten(1).view(x.shape[0], -1, WIDTH))


def otherwise_for_one_row(s: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Makes no copy of one row before its first module, and one after it."""
    h = s.norm(x.transpose(0, 1).contiguous())
    return s.out(h.contiguous().transpose(0, 1).contiguous())


def norm_mix() -> dict[str, nn.Module]:
    return {"norm": nn.LayerNorm(WIDTH), "mix": Mix(), "out": linear()}


BRANCHES: dict[str, tuple[Callable[[Any, Tensor, Tensor | None], Tensor], Callable[[], dict[str, nn.Module]]]] = {
    "a mask": (lambda s, x, mask: s.out(s.mix(s.norm(x), mask)), norm_mix),
    "a mask by keyword": (lambda s, x, mask: s.out(s.mix(s.norm(x), mask=mask)), norm_mix),
    "a mask first": (lambda s, x, mask: s.out(torch.tanh(s.mix(x, mask))), lambda: {"mix": Mix(), "out": linear()}),
    "windows inside": (windows_inside, lambda: norm_mix() | {"mix": linear(3)}),
    "numbers of windows": (numbers_of_windows, lambda: {"mix": MixWindows(), "out": MixWindows()}),
    "functions before and after": (
        lambda s, x, mask: s.out(functional.gelu(s.mix(torch.tanh(x).reshape(-1, 3 * WIDTH)))).reshape(x.shape),
        lambda: {"mix": linear(3), "out": linear(3)},
    ),
    "windows first": (shifted_windows, lambda: {"mix": linear(2), "out": nn.LayerNorm(WIDTH)}),
    "a parameter and a buffer": (
        lambda s, x, mask: s.out(torch.tanh(s.mix(x)) * s.gamma + s.shift),
        lambda: {"mix": linear(), "out": linear()},
    ),
    "rows on the second axis": (
        lambda s, x, mask: s.out(s.norm(x).transpose(0, 1)).transpose(0, 1),
        lambda: {"norm": nn.LayerNorm(WIDTH), "out": linear()},
    ),
    "another way": (otherwise, norm_mix),
    "a tensor from outside by a module": (
        by_a_module,
        lambda: norm_mix() | {"embed": nn.Linear(WIDTH, 2 * WIDTH), "mix": linear()},
    ),
    "a tensor from outside": (
        lambda s, x, mask: s.out(torch.tanh(s.mix(s.norm(x)) * mask[:, None, None])),
        norm_mix,
    ),
    "x again": (lambda s, x, mask: s.out(torch.tanh(s.mix(s.norm(x)) * x)), norm_mix),
    "two ways": (
        lambda s, x, mask: s.out(s.mix(s.norm(x), s.query(x)[:, 0, 0])),
        lambda: norm_mix() | {"query": linear()},
    ),
    "a shared activation": (shared_activation, lambda: norm_mix() | {"act": ACTIVATION, "out": linear()}),
    "a shape from before": (shape_from_before, norm_mix),
    "otherwise for one row": (otherwise_for_one_row, norm_mix),
}


def chain(name: str) -> Chain:
    torch.manual_seed(0)
    branch, layers = BRANCHES[name]
    return Chain(*(Block(branch, **layers()) for _ in range(3))).double()


def batch(rows: int, tokens: int = TOKENS, masked: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=generator)
    mask = torch.randn(rows, dtype=torch.float64, generator=generator)
    return (x, mask) if masked else (x,)


def entries_seen(model: Chain) -> list[int]:
    """How many numbers `out` of each block will be called with."""
    seen: list[int] = []
    for block in model.blocks:
        after_forward(block.out, lambda args, _: seen.append(args[0].numel()))
    return seen


def check(
    model: Chain,
    found_with: tuple[Tensor, ...],
    *batches: tuple[Tensor, ...],
    change: Callable[[Chain], None] = lambda model: None,
) -> bool:
    """Train a DROP and a FREEZE step on each batch beside the oracle; did a branch end on some of the rows?

    Args:
        model: Its branches can run on rows.
        found_with: The inputs with which branches are found.
        batches: What it is trained on.
        change: Made to the model after `attach`.
    """
    reference, some = copy.deepcopy(model), False
    handle = rdp.attach(model, 0.5, decay="constant", seed=2, example_inputs=found_with)
    assert [branch.compute for branch in handle.branches] == ["rows"] * 3
    ours, theirs = entries_seen(model), entries_seen(reference)
    change(model)
    for inputs in batches:
        for _ in range(2):
            x, y = (inputs[0].clone().requires_grad_() for _ in range(2))
            output = model(x, *inputs[1:])
            expected = reference.oracle(handle.masks, handle.phase, y, *inputs[1:])
            torch.testing.assert_close(output, expected)
            output.square().sum().backward()
            expected.square().sum().backward()
            for mine, their in zip((x, *model.parameters()), (y, *reference.parameters()), strict=True):
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (mine, their)]
                torch.testing.assert_close(*gradients)
            some |= min(ours) < min(theirs)
            model.zero_grad()
            reference.zero_grad()
            ours.clear()
            theirs.clear()
            handle.advance()
    return some


@pytest.mark.parametrize("name", BRANCHES)
def test_it_runs_on_some_rows_and_is_exact(name):
    assert check(chain(name), batch(2), batch(6), batch(3), batch(1), batch(7))


BEGINNINGS = {
    "a tensor from outside": "a bare function takes a tensor from outside of the branch",
    "x again": "a bare function takes a tensor from outside of the branch",
    "two ways": "",
    "a tensor from outside by a module": "",
    "a shared activation": "",
    "a shape from before": "a forward on some rows raised IndexError",
    "otherwise for one row": "",
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_what_cannot_run_on_some_rows_may_come_first(name):
    reason = BEGINNINGS[name] and f"rows from `blocks.1.out` on: {BEGINNINGS[name]}"
    with rdp.attach(chain(name), 0.5, example_inputs=batch(2)) as handle:
        assert handle.branches[1].note == reason


@pytest.mark.parametrize("name", ["a mask", "a parameter and a buffer", "rows on the second axis", "windows first"])
def test_other_numbers_of_tokens_than_when_the_branch_was_found(name):
    check(chain(name), batch(2, 4), batch(6, 8), batch(6, 4), batch(4, 2))


@pytest.mark.parametrize("name", ["a mask", "a mask first"])
@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_mask_may_come_or_go_after_the_branch_was_found(name, found, trained):
    assert check(chain(name), batch(2, masked=found), batch(6, masked=trained)) is (found == trained)


def test_a_module_that_is_called_in_another_way_gets_all_rows():
    def change(model: Chain) -> None:
        model.blocks[1].how = "mask by keyword"

    assert check(chain("another way"), batch(2), batch(6), batch(3), change=change)


def test_a_module_that_is_called_in_another_way_without_x_says_so():
    model = chain("another way")
    rdp.attach(model, 0.5, decay="constant", example_inputs=batch(2))
    model.blocks[0].how = "x by keyword"
    with pytest.raises(rdp.ForwardError) as error:
        model(*batch(6))
    assert str(error.value) == (
        "`blocks.0.mix` is called with other arguments than when the branch was found, and x is not among them. Attach "
        "with compute='dense', or with example_inputs like this batch"
    )


def test_a_module_that_makes_what_is_not_x_and_is_called_in_another_way_says_so():
    model = chain("a tensor from outside by a module")
    rdp.attach(model, 0.5, decay="constant", example_inputs=batch(2))
    x, mask = batch(6)
    with pytest.raises(rdp.ForwardError, match=r"`blocks.0.embed` is called with other arguments"):
        model(x, mask[:1])


def test_a_forward_that_failed_in_a_branch_leaves_nothing_behind():
    model = chain("a mask")

    def fails(model: Chain) -> None:
        def fail(*args: object) -> None:
            raise RuntimeError("out of memory")

        mend = after_forward(model.blocks[1].mix, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(*batch(6))
        mend()

    assert check(model, batch(2), batch(6), change=fails)


class OnlyInTraining(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.mix, self.out, self.end, self.where = linear(), linear(), nn.Identity(), where

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x)
        h = self.out(h * 1.5 if self.training and self.where == "mix" else h)
        return x + self.end(h * 1.5 if self.training and self.where == "out" else h)


@pytest.mark.parametrize("name", ["mix", "out"])
def test_what_is_otherwise_in_training_than_it_was_traced_is_dense(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(OnlyInTraining(name))
        (branch,) = rdp.attach(model, 0.5, compute="rows", example_inputs=batch(2)[0].float()).branches
    where = {"mix": "rows from `0.out` on", "out": "dense"}[name]
    assert branch.note == f"{where}: its rows influence each other"


def test_dropout_is_dense_by_default_and_applied_to_all_rows_with_compute_rows():
    torch.manual_seed(0)
    model = Chain(Block(lambda s, x, mask: s.out(s.fc(x)), fc=linear(), out=nn.Dropout(0.5)))
    x = torch.randn(64, WIDTH)
    with rdp.attach(model, 0.5, example_inputs=x) as handle:
        assert handle.branches[0].compute == "dense"
    handle = rdp.attach(model, 0.5, compute="rows", example_inputs=x)
    assert handle.branches[0].compute == "rows"
    model(x).sum().backward()
    handle.advance()
    zeroed = model(x) == x  # FREEZE runs the dropped rows by a program of its own
    for rows in (handle.masks[0], ~handle.masks[0]):
        assert 0.35 < zeroed[rows].float().mean() < 0.65
