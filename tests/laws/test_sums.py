"""Residual sums in every form that code gives them, against Algorithm 1 by hand: outputs, gradients and what is frozen.

A block writes its sums as its author would, for the library, and once more as `self.add(number, shortcut, branch)`, for
the oracle. The masks are the handle's.
"""

from __future__ import annotations

import copy
import functools
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rdp
from laws.training import loss

WIDTH, TOKENS = 4, 3


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class Block(nn.Module):
    """`sums` residual sums; `masks` and `phase` are set for the oracle alone, which calls `explicit`."""

    sums = 1
    masks: Tensor
    phase = "PLAIN"

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def add(self, number: int, shortcut: Tensor, branch: Tensor) -> Tensor:
        m = self.masks[number].to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
        if self.phase == "DROP":
            return shortcut + m * branch
        return shortcut + m * branch.detach() + (1 - m) * branch

    def explicit(self, x: Tensor) -> Tensor:
        """`x + f(x)`."""
        return self.add(0, x, self.f(x))


# -- one sum ----------------------------------------------------------------------------------------------------------


class Subtract(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, -self.f(x))


class ReverseSubtract(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub(self.f(x), x).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, -self.f(x)).tanh()


class SubtractInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y -= self.f(x)
        return y.tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, -self.f(x)).tanh()


class Alpha(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=0.5).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, 0.5 * self.f(x)).tanh()


class AddInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone().add_(self.f(x)).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class AddToTheStream(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.f(x.clone())
        return x


class Lerp(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.f(x), 0.25).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, 0.75 * x, 0.25 * self.f(x)).tanh()


class LerpOfTheBranch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).lerp_(x, torch.full_like(x, 0.25)).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, 0.25 * x, 0.75 * self.f(x)).tanh()


class ScaledBoth(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * x + 0.25 * self.f(x)) / 0.75

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, 0.5 / 0.75 * x, 0.25 / 0.75 * self.f(x))


class Addcmul(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.f(x), torch.full((WIDTH,), 2.0, dtype=x.dtype), value=0.5).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class Addcdiv(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcdiv(x, self.f(x), torch.full((WIDTH,), 2.0, dtype=x.dtype)).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, self.f(x) / 2).tanh()


class Addmm(Block):
    """The last layer is in the sum, and its weight in no module: the block is masked as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x, self.f(x), self.weight.expand(len(x), -1, -1))

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, self.f(x) @ self.weight)


class AddmmBuffer(Addmm):
    """The matrix is constant."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x.flatten(0, 1), self.f(x).flatten(0, 1), self.weight).view_as(x).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class Baddbmm(AddmmBuffer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x, self.f(x), self.weight.expand(len(x), -1, -1), beta=0.5).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x / 2, self.f(x) @ self.weight).tanh()


class StackSum(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.f(x)]).sum(0).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class StackMean(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(torch.stack((self.f(x), x), dim=-1), dim=-1).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x / 2, self.f(x) / 2).tanh()


class CatSum(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[None], self.f(x)[None]]).sum(dim=0).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class WeightedStack(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("k,kbtd->btd", torch.tensor([2.0, 0.5], dtype=x.dtype), torch.stack([x, self.f(x)]))

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, 2 * x, 0.5 * self.f(x))


class SumOfList(Block):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.f(x)]).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class Reduce(Block):
    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(operator.add, [self.f(x), x]).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return super().explicit(x).tanh()


class ScatterAdd(Block):
    """Some of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([2, 0], device=x.device)[:, None].expand(len(x), 2, WIDTH)
        return x.scatter_add(1, index, self.f(x.gather(1, index)))

    def explicit(self, x: Tensor) -> Tensor:
        branch = self.f(x[:, [2, 0]])
        return self.add(0, x, torch.stack([branch[:, 1], torch.zeros_like(branch[:, 0]), branch[:, 0]], 1))


class IndexAdd(ScatterAdd):
    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([2, 0], device=x.device)
        return torch.index_add(x, 1, index, self.f(x[:, index]))


class Masked(Block):
    """Out of place into a slice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.f(x[:, 1:]), (0, 0, 1, 0)) + x

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, F.pad(self.f(x[:, 1:]), (0, 0, 1, 0)))


@dataclass
class Result:
    hidden: Tensor
    extra: None = None


class InDataclass(Block):
    """The branch and its sum travel in objects."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, x: Tensor) -> Result:
            return Result(self.f(x))

    def __init__(self) -> None:
        super().__init__()
        self.f = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return Result(x + self.f(x).hidden).hidden.tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, self.f.f(x)).tanh()


class SumModule(Block):
    """x-transformers' `scale_residual`: the sum, and a scale of the shortcut, have a module of their own."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))

        def forward(self, out: Tensor, x: Tensor) -> Tensor:
            return out + x * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.residual = self.Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.f(x), x).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, self.residual.scale * x, self.f(x)).tanh()


class MagnitudePreserving(Block):
    """KarrasUnet's sum."""

    class Sum(nn.Module):
        def forward(self, x: Tensor, res: Tensor) -> Tensor:
            return (x * 0.7 + res * 0.3) / (0.7**2 + 0.3**2) ** 0.5

    def __init__(self) -> None:
        super().__init__()
        self.sum = self.Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.f(x), x)

    def explicit(self, x: Tensor) -> Tensor:
        norm = (0.7**2 + 0.3**2) ** 0.5
        return self.add(0, 0.3 / norm * x, 0.7 / norm * self.f(x))


class SqueezeExcite(Block):
    """SENet18 of pytorch-cifar: excitation inline, and a shortcut that is a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        out = self.f(x)
        w = torch.sigmoid(self.fc2(F.relu(self.fc1(out.mean(1, keepdim=True)))))
        return out * w

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.short(x)
        return out

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, self.short(x), self.branch(x))


class Complex(Block):
    """Numbers that are not real."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(WIDTH // 2, WIDTH // 2, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(z + self.c(z)).flatten(-2).tanh()

    def explicit(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(self.add(0, z, self.c(z))).flatten(-2).tanh()


def swish(x: Tensor, beta: float) -> Tensor:
    return x * torch.sigmoid(beta * x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and used
    scripted_swish = torch.jit.script(swish)


class Scripted(Block):
    """A function of TorchScript inside of the branch."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(scripted_swish(self.inner(x), 2.0))

    def __init__(self) -> None:
        super().__init__()
        self.f = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


# -- several sums -----------------------------------------------------------------------------------------------------


class Two(Block):
    sums = 2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.g(x)

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(1, self.add(0, x, self.f(x)), self.g(x))


class BranchesFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x) + x

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(0, x, self.f(x) + self.g(x))


class StackOfThree(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.f(x), self.g(x)]).sum(0)


class SumOfThree(Two):
    def forward(self, x: Tensor) -> Tensor:
        return sum([self.f(x), x, self.g(x)])


class OneOfEachSign(Two):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) - self.g(x)

    def explicit(self, x: Tensor) -> Tensor:
        return self.add(1, self.add(0, x, self.f(x)), -self.g(x))


class SharedNorm(Two):
    """GPT-J's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.f(h) + self.g(h)

    def explicit(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.add(1, self.add(0, x, self.f(h)), self.g(h))


class Palm(SharedNorm):
    """The branches are added first, and are one."""

    sums = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.f(h) + self.g(h) + x

    def explicit(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.add(0, x, self.f(h) + self.g(h))


class AfterView(SharedNorm):
    """The block begins with a view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).contiguous().transpose(1, 2))


class Reversible(Two):
    """RevNet: two streams, each the input of the other's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH // 2)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        a = a + self.f(b)
        b = b + self.g(a)
        return torch.cat([a, b], dim=-1)

    def explicit(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        a = self.add(0, a, self.f(b))
        b = self.add(1, b, self.g(a))
        return torch.cat([a, b], dim=-1)


class JointAttention(Two):
    """MM-DiT: two streams attend to each other, each with its own way out."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def attend(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        parts = [f(n(x)).chunk(3, -1) for f, n, x in zip(self.qkv, self.norms, (a, b), strict=True)]
        q, k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        both = F.scaled_dot_product_attention(q, k, v)
        return self.out[0](both[:, : a.shape[1]]), self.out[1](both[:, a.shape[1] :])

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :1] * 1, x[:, 1:] * 1
        of_a, of_b = self.attend(a, b)
        return torch.cat([a + of_a, b + of_b], dim=1)

    def explicit(self, x: Tensor) -> Tensor:
        a, b = x[:, :1], x[:, 1:]
        of_a, of_b = self.attend(a, b)
        return torch.cat([self.add(0, a, of_a), self.add(1, b, of_b)], dim=1)


BLOCKS = [kind for kind in dict(globals()).values() if isinstance(kind, type) and issubclass(kind, Block)]
BLOCKS = [kind for kind in BLOCKS if kind not in (Block, Two)]
GROUPS = [BLOCKS[start::5] for start in range(5)]
"""To attach takes longer than to train."""


class Net(nn.Module):
    """These blocks between a stem and a head."""

    def __init__(self, blocks: Sequence[type[Block]]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(block() for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def explicit(self, phase: str, masks: Tensor) -> Net:
        """A copy that is its own oracle."""
        oracle = copy.deepcopy(self)
        oracle.zero_grad()
        per_block = masks.split([block.sums for block in oracle.blocks])
        for block, of_block in zip(oracle.blocks, per_block, strict=True):
            block.phase, block.masks = phase, of_block
            block.forward = block.explicit
        return oracle


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all parameters and of the input; zeros where there are none."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    loss(out).backward()
    named = {"input": x, **dict(model.named_parameters())}
    return {"output": out.detach()} | {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()
    }


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("blocks", GROUPS, ids=lambda blocks: "-".join(block.__name__ for block in blocks))
def test_every_form_of_a_sum_is_found_and_gated(blocks: list[type[Block]], mode: str) -> None:
    torch.manual_seed(0)
    model = Net(blocks).double()
    example = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    with rdp.attach(model, 0.5, mode=mode, decay="constant", seed=5, example_inputs=example) as handle:
        number = [sum(branch.block.startswith(f"blocks.{i}") for branch in handle.branches) for i in range(len(blocks))]
        assert dict(zip(blocks, number, strict=True)) == {block: block.sums for block in blocks}
        assert handle.refused == ()
        for step in range(6):
            x = torch.randn(5 - step % 2, TOKENS, WIDTH, dtype=torch.float64)
            phase = handle.phase.name
            ours = gradients(model, x)
            by_hand = gradients(model.explicit(phase, handle.masks), x)
            for name, wanted in by_hand.items():
                torch.testing.assert_close(ours[name], wanted, msg=lambda m, w=f"{phase}, {name}": f"{w}: {m}")
            silent = {name for name, gradient in by_hand.items() if not gradient.any()}
            owned = {name for branch in handle.branches for name in branch.parameters}
            assert set(handle.frozen) == silent & owned
            handle.advance()
