"""Branches that run on some of the rows: exact where they run so, and dense where that cannot be known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import rdp

WIDTH = 8


class Attention(nn.Module):
    """Self-attention with an optional mask, one a row."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MaskedBlock(nn.Module):
    """The mask goes to a module in the middle of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.out = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.out(self.attn(self.norm(x), mask=mask))


class MaskFirstBlock(nn.Module):
    """The mask goes to the first module of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.out(self.attn(x, mask=mask))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if mask is None else block(x, mask)
        return x


def row_masks(rows: int, tokens: int) -> Tensor:
    """Row i may look at its first i % tokens + 1 tokens only."""
    allowed = torch.arange(tokens)[None, :] <= (torch.arange(rows) % tokens)[:, None]
    return allowed[:, None, :].expand(rows, tokens, tokens)


def two_steps(model: nn.Module, compute: str, found_with: tuple, *inputs: Tensor) -> list[Tensor]:
    """Outputs and gradients of a DROP and of a FREEZE step."""
    model = copy.deepcopy(model)
    handle = rdp.attach(model, 0.5, decay="constant", compute=compute, example_inputs=found_with, seed=2)
    result = []
    for _ in range(2):
        output = model(*inputs)
        output.square().mean().backward()
        result.append(output.detach())
        result += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        handle.advance()
    return result


@pytest.mark.parametrize("block", [MaskedBlock, MaskFirstBlock])
@pytest.mark.parametrize("found_masked", [True, False])
@pytest.mark.parametrize("trained_masked", [True, False])
def test_masks_of_rows_follow_their_rows_whatever_the_branches_were_found_with(block, found_masked, trained_masked):
    torch.manual_seed(0)
    model = Stack(block(), block()).double()
    x = torch.randn(6, 5, WIDTH, dtype=torch.float64)
    found_with = (x[:2], row_masks(2, 5)) if found_masked else (x[:2],)
    inputs = (x, row_masks(6, 5)) if trained_masked else (x,)
    for ours, dense in zip(
        two_steps(model, "auto", found_with, *inputs), two_steps(model, "dense", found_with, *inputs), strict=True
    ):
        torch.testing.assert_close(ours, dense)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(functional.dropout(self.fc1(x), 0.3, self.training))


class OnlyInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if self.training:
            h = h * 1.5
        return x + self.fc2(h)


class CapturedBatch(nn.Module):
    """Takes the batch size from before the branch, and so cannot run on fewer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        return x + self.fc2(self.fc1(x).reshape(rows, -1))


class Centred(nn.Module):
    """Couples the rows, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return x + self.fc2(h - h.mean(0, keepdim=True))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.fc(x))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (FunctionalDropout, "a bare function applies dropout"),
        (OnlyInTraining, "its rows influence each other|called otherwise"),
        (CapturedBatch, "raised RuntimeError"),
        (Centred, "depends on the batch|influence each other"),
        (Normed, "BatchNorm1d"),
    ],
)
@pytest.mark.filterwarnings("ignore:the rows of a batch influence")
def test_a_branch_that_cannot_run_on_some_rows_is_dense_and_says_why(block, reason):
    torch.manual_seed(0)
    model = Stack(block(), block())
    handle = rdp.attach(model, 0.5, decay="constant", compute="rows", example_inputs=torch.randn(4, WIDTH))
    assert [branch.compute for branch in handle.branches] == ["dense", "dense"]
    for branch in handle.branches:
        assert branch.note.startswith("dense: ")
        assert any(part in branch.note for part in reason.split("|"))


class DropoutAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.fc(x))


def test_dropout_is_dense_by_default_and_applied_to_all_rows_with_compute_rows():
    torch.manual_seed(0)
    model = Stack(DropoutAtTheEnd())
    x = torch.randn(64, WIDTH)
    with rdp.attach(model, 0.5, example_inputs=x) as handle:
        assert handle.branches[0].compute == "dense"
        assert "compute='rows'" in handle.branches[0].note
    handle = rdp.attach(model, 0.5, compute="rows", example_inputs=x)
    assert handle.branches[0].compute == "rows"
    model(x)
    handle.advance()
    zeroed = model(x) == x  # FREEZE runs the dropped rows by a program of its own
    for rows in (handle.masks[0], ~handle.masks[0]):
        assert 0.35 < zeroed[rows].float().mean() < 0.65


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_what_is_not_needed_is_not_computed(mode):
    """Of a step's 3 units DROP needs (1 - r) * 3 and FREEZE 1 + 2r; here r = 0.1."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(16)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model, x = Net(), torch.randn(64, 64, requires_grad=True)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    plain = flops()
    handle = rdp.attach(model, 0.1, mode=mode, decay="constant", example_inputs=x)
    ratios: dict[rdp.Phase, list[float]] = {rdp.Phase.DROP: [], rdp.Phase.FREEZE: []}
    for _ in range(40):
        ratios[handle.phase].append(flops() / plain)
        handle.advance()
    assert sum(ratios[rdp.Phase.DROP]) / 20 < 0.93
    assert sum(ratios[rdp.Phase.FREEZE]) / 20 < 0.45


def rows_seen(model: nn.Module, x: Tensor) -> list[int]:
    """How many rows the first module of each block was called with, in one forward and backward."""
    seen: list[int] = []
    hooks = [b.norm.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))) for b in model.blocks]
    model(x).sum().backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("compute", ["auto", "dense"])
def test_a_branch_dropped_for_the_whole_batch_runs_on_a_single_row(compute):
    torch.manual_seed(0)
    model, x = Stack(*(MaskedBlock() for _ in range(6))), torch.randn(5, 3, WIDTH)
    handle = rdp.attach(model, 0.5, mode="batch", decay="constant", compute=compute, example_inputs=x)
    for _ in range(3):
        seen = rows_seen(model, x)
        assert seen == [5 if compute == "dense" or keep else 1 for keep in handle.masks[:, 0]]
        assert not handle.masks.all()
        handle.advance()
        assert rows_seen(model, x) == [5] * 6  # FREEZE is the full network
        handle.advance()
    for name in handle.frozen:
        assert model.get_parameter(name).grad is None


# -- Functions before the first module: they run on all rows -----------------------------------------------------------


class Windowed(nn.Module):
    """Swin v2's attention branch: a shift and a partition into windows, folded into the batch, before any module."""

    def __init__(self, window: int = 2) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.attn, self.norm, self.window = Attention(), nn.LayerNorm(WIDTH), window

    def branch(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        h = torch.roll(x * self.gain, 1, dims=1).view(rows * tokens // self.window, self.window, WIDTH)
        return self.norm(torch.roll(self.attn(h).view(-1, tokens, WIDTH), -1, dims=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Tokenwise(nn.Module):
    """Rows are folded into the batch before x already: a row is several consecutive entries of x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.attn, self.out = nn.Linear(WIDTH, WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        folded = self.linear(x).unflatten(1, (-1, 2)).flatten(0, 1)
        return (folded + self.out(self.attn(folded))).unflatten(0, (x.shape[0], -1)).flatten(1, 2)


class ReachesBack(Windowed):
    """What a function made before the first module is used after it, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        return x + self.norm(self.attn(h) * h)


@pytest.mark.parametrize("block", [Windowed, Tokenwise])
def test_windows_and_tokens_in_the_place_of_rows_follow_their_rows(block):
    torch.manual_seed(0)
    model = Stack(block(), block(), block()).double()
    x = torch.randn(6, 4, WIDTH, dtype=torch.float64)
    with rdp.attach(model, 0.5, decay="constant", example_inputs=x) as handle:
        assert [branch.compute for branch in handle.branches] == ["rows"] * 3
    for ours, dense in zip(two_steps(model, "auto", (x,), x), two_steps(model, "dense", (x,), x), strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("block", [Windowed, Tokenwise])
def test_an_input_with_another_number_of_windows_is_handled(block):
    torch.manual_seed(0)
    model = Stack(block(), block()).double()
    x, longer = torch.randn(6, 4, WIDTH, dtype=torch.float64), torch.randn(5, 8, WIDTH, dtype=torch.float64)
    ours, dense = two_steps(model, "auto", (x,), longer), two_steps(model, "dense", (x,), longer)
    for some, every in zip(ours, dense, strict=True):
        torch.testing.assert_close(some, every)


def test_a_branch_that_uses_such_functions_again_is_dense():
    with rdp.attach(Stack(ReachesBack()), 0.5, example_inputs=torch.randn(4, 4, WIDTH)) as handle:
        assert "not a chain of modules" in handle.branches[0].note


# -- compute="ghost": statistics of the rows that run together ---------------------------------------------------------


class NormedConv(nn.Module):
    """A branch with batch normalisation in the middle and at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm(self.conv(x)).relu()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(functional.relu(self.norm(self.conv(x)))))


def ghost_oracle(model: Stack, x: Tensor, masks: Tensor, phase: rdp.Phase) -> Tensor:
    """Each group of rows goes through the branch by itself; only the undropped leave a mark in running statistics."""
    for block, keep in zip(model.blocks, masks, strict=True):
        if phase is rdp.Phase.DROP and not keep.any() and len(keep) > 2:
            f = torch.zeros_like(x)
        elif keep.sum() < 2 or (~keep).sum() < 2:
            f = block.branch(x)
            m = keep.view(-1, 1, 1, 1).to(f.dtype)
            f = m * f if phase is rdp.Phase.DROP else m * f.detach() + (1 - m) * f
        else:
            f = torch.zeros_like(x)
            kept = block.branch(x[keep])
            f[keep] = kept if phase is rdp.Phase.DROP else kept.detach()
            if phase is rdp.Phase.FREEZE:
                f[~keep] = _aside(block, x[~keep])
        x = x + f
    return x


def _aside(block: NormedConv, x: Tensor) -> Tensor:
    buffers = [(norm, dict(norm._buffers)) for norm in (block.norm, block.norm2)]
    for norm, original in buffers:
        norm._buffers.update({name: buffer.clone() for name, buffer in original.items()})
    f = block.branch(x)
    for norm, original in buffers:
        norm._buffers.update(original)
    return f


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_ghost_takes_statistics_over_the_rows_that_run_together(rows, seed, mode):
    torch.manual_seed(seed)
    model = Stack(NormedConv(), NormedConv(), NormedConv()).double()
    reference = copy.deepcopy(model)
    x = torch.randn(rows, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    handle = rdp.attach(model, 0.4, mode=mode, decay="constant", compute="ghost", example_inputs=x, seed=seed)
    assert [branch.compute for branch in handle.branches] == ["rows"] * 3
    for _ in range(4):
        phase = handle.phase
        output = model(x)
        expected = ghost_oracle(reference, x, handle.masks, phase)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            zero = torch.zeros_like(p)
            torch.testing.assert_close(zero if p.grad is None else p.grad, zero if q.grad is None else q.grad, msg=name)
        for buffer, wanted in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(buffer, wanted)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_batch_normalisation_is_dense_but_for_ghost(mode):
    x = torch.randn(4, 3, 4, 4)
    for compute, expected in (("auto", "dense"), ("rows", "dense"), ("ghost", "rows")):
        with rdp.attach(Stack(NormedConv()), 0.4, mode=mode, compute=compute, example_inputs=x) as handle:
            assert handle.branches[0].compute == expected
            assert ("compute='ghost'" in handle.branches[0].note) == (expected == "dense")


def dropped_ghost() -> tuple[Stack, rdp.ResidualDropPath]:
    """A model whose two branches are dropped in the second of two forwards, but not in the first."""
    for seed in range(100):
        torch.manual_seed(0)
        model, x = Stack(NormedConv(), NormedConv()), torch.randn(8, 3, 4, 4)
        handle = rdp.attach(model, 0.5, mode="batch", decay="constant", compute="ghost", example_inputs=x, seed=seed)
        drawn = []
        for _ in range(2):
            model(x)
            drawn.append(handle.masks[:, 0].tolist())
        handle.remove()
        if drawn == [[True, True], [False, False]]:
            model = Stack(NormedConv(), NormedConv())
            return model, rdp.attach(
                model, 0.5, mode="batch", decay="constant", compute="ghost", example_inputs=x, seed=seed
            )
    raise AssertionError("no such seed")


def test_ghost_skips_dropped_branches_in_batch_mode_and_their_statistics_do_not_move():
    model, _ = dropped_ghost()
    rows: list[int] = []
    model.blocks[1].conv.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    x = torch.randn(8, 3, 4, 4)
    first = model(x)
    before = [buffer.clone() for buffer in model.buffers()]
    model(x).sum().backward()
    first.sum().backward()  # of an earlier micro-batch, and through statistics that have been put back since
    assert rows == [8, 2]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_a_forward_that_failed_in_a_branch_leaves_nothing_behind():
    torch.manual_seed(0)
    model = Stack(MaskedBlock(), MaskedBlock()).double()
    x = torch.randn(6, 5, WIDTH, dtype=torch.float64)
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=x)
    reference = two_steps(copy.deepcopy(model), "auto", (x,), x)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.blocks[1].attn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x)
    hook.remove()
    handle.remove()
    for ours, expected in zip(two_steps(model, "auto", (x,), x), reference, strict=True):
        torch.testing.assert_close(ours, expected)
