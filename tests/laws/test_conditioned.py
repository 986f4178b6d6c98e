"""Branches that are multiplied by something from outside, `x + g(c) * f(x)`: FREEZE detaches the whole product.

Every model writes its sums as `self.add(number, x, branch)`: a plain `x + branch` for the library, and Algorithm 1 by
hand for the oracle. The masks are the handle's.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rdp
from laws.training import loss

WIDTH, TOKENS = 4, 3


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """`sums` residual sums; `masks` and `phase` are set by the oracle alone."""

    sums = 1
    masks: Tensor | None = None
    phase = "PLAIN"

    def add(self, number: int, x: Tensor, branch: Tensor) -> Tensor:
        if self.masks is None:
            return x + branch
        m = self.masks[number].to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x + m * branch if self.phase == "DROP" else x + m * branch.detach() + (1 - m) * branch


class ModuleGate(Block):
    """The gate is a module of c."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, self.gate(c).unsqueeze(1) * self.f(x))


class FunctionGate(ModuleGate):
    """Functions follow the module that makes the gate, and it multiplies from the right."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, self.f(x) * (1 + torch.tanh(2 * self.gate(c)).sigmoid())[:, None])


class TwoFactors(ModuleGate):
    """Two modules make it, of c and of another module's output, and the product is scaled again."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.before = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(
            0, x, (self.gate(c) + self.before(c)).unsqueeze(1) * self.f(x) / (2 + self.other(c)[:, None].tanh())
        )


class AdaLNZero(Block):
    """DiT: one Linear makes shift, scale and gate of two branches."""

    sums = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = self.add(0, x, gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1)))
        return self.add(1, x, gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2)))


class SliceOfView(AdaLNZero):
    """The same parts, taken out of a view."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c).view(-1, 6, WIDTH).transpose(0, 1)
        x = self.add(0, x, parts[2][:, None] * self.attn(modulate(self.norm1(x), parts[0], parts[1])))
        return self.add(1, x, self.mlp(modulate(self.norm2(x), parts[3], parts[4])) * parts[5].unsqueeze(1))


class NormWithGate(Block):
    """AdaLayerNormZero of diffusers: a module of the branch returns the gate beside its own output."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            shift, scale, gate = self.linear(nn.functional.silu(c)).chunk(3, dim=1)
            return modulate(self.norm(x), shift, scale), gate

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = self.Norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h, gate = self.norm(x, c)
        return self.add(0, x, gate.unsqueeze(1) * self.f(h))


class GivenGate(Block):
    """The gate is an argument of the block, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, c.unsqueeze(1) * self.f(x))


class GateOfBoth(Block):
    """The gate is made of x, too: both factors are masked."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_x, self.of_c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.of_x(x) + self.of_c(c).unsqueeze(1)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gate = nn.Linear(WIDTH, WIDTH), self.Gate()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, self.gate(x, c) * self.f(x))


class FilmModule(Block):
    """A module that takes both, at the end of the branch: nothing is outside."""

    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, h: Tensor, c: Tensor) -> Tensor:
            shift, scale = self.linear(c).chunk(2, dim=1)
            return modulate(h, shift, scale)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.film = nn.Linear(WIDTH, WIDTH), self.Film()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, self.film(self.f(x), c))


class InPlaceGate(ModuleGate):
    """All in place."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate, branch = self.gate(c).mul_(2).tanh_(), self.f(x)
        branch *= gate.unsqueeze(1)
        return self.add(0, x, branch)


class Addcmul(ModuleGate):
    """The sum itself multiplies."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate, branch = self.gate(c).unsqueeze(1), self.f(x)
        return torch.addcmul(x, gate, branch) if self.masks is None else self.add(0, x, gate * branch)


class TableGate(Block):
    """A parameter outside of any module is added to what the gate is made of: the block is detached as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, (self.table + c).unsqueeze(1) * self.f(x))


class Itself(Block):
    """x multiplies its own branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, x * self.f(x + c.unsqueeze(1)))


BLOCKS = [
    ModuleGate, FunctionGate, TwoFactors, AdaLNZero, SliceOfView, NormWithGate, GivenGate, GateOfBoth, FilmModule,
    InPlaceGate, Addcmul, TableGate, Itself,
]  # fmt: skip


class Net(nn.Module):
    """Two blocks after an encoder of c that they share."""

    def __init__(self, block: type[Block], reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem, self.encoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, c = self.stem(x), self.encoder(c).tanh()
        for block in self.blocks:
            x = block(x, c) if self.reentrant is None else checkpoint(block, x, c, use_reentrant=self.reentrant)
        return self.head(x)

    def explicit(self, phase: str, masks: Tensor) -> Net:
        """A copy that is its own oracle."""
        oracle = copy.deepcopy(self)
        oracle.zero_grad()
        oracle.reentrant = None
        for number, block in enumerate(oracle.blocks):
            block.phase, block.masks = phase, masks[number * block.sums : (number + 1) * block.sums]
        return oracle


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, TOKENS, WIDTH, dtype=torch.float64), torch.randn(rows, WIDTH, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Of all parameters and both inputs; zeros where there are none."""
    model.zero_grad()
    x, c = x.clone().requires_grad_(), c.clone().requires_grad_()
    loss(model(x, c)).backward()
    named = {"input x": x, "input c": c, **dict(model.named_parameters())}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}


def agree(handle: rdp.ResidualDropPath, model: Net, steps: int) -> None:
    """Train for some steps beside the oracle."""
    for step in range(steps):
        x, c = batch(5 - step % 2)
        phase = handle.phase.name
        ours = gradients(model, x, c)
        by_hand = gradients(model.explicit(phase, handle.masks), x, c)
        for name, gradient in by_hand.items():
            torch.testing.assert_close(ours[name], gradient, msg=lambda m, w=f"{phase}, {name}": f"{w}: {m}")
        silent = {name for name, g in by_hand.items() if not g.any()}
        assert set(handle.frozen) == silent - {"input x", "input c"}
        handle.advance()


@pytest.mark.parametrize("compute", ["auto", "dense"])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_nothing_outside_learns_from_frozen_rows(block: type[Block], mode: str, compute: str) -> None:
    torch.manual_seed(0)
    model = Net(block).double()
    settings = {"mode": mode, "compute": compute, "decay": "constant", "example_inputs": batch(3)}
    with warnings.catch_warnings(), rdp.attach(model, 0.5, seed=5, **settings) as handle:
        warnings.simplefilter("error", rdp.RdpWarning)
        assert len(handle.branches) == 2 * block.sums
        agree(handle, model, 12)
        assert handle.check().problems == ()


@pytest.mark.parametrize("block", [ModuleGate, AdaLNZero, GivenGate], ids=lambda block: block.__name__)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoints(block: type[Block], reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Net(block, reentrant).double()
    with rdp.attach(model, 0.5, decay="constant", seed=5, example_inputs=batch(3)) as handle:
        agree(handle, model, 6)


@pytest.mark.parametrize("block", [ModuleGate, AdaLNZero, GivenGate, NormWithGate], ids=lambda block: block.__name__)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_compiled(block: type[Block], mode: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(block).double()
    with rdp.attach(model, 0.5, mode=mode, decay="constant", seed=5, example_inputs=batch(3)) as handle:
        compiled = torch.compile(model, backend="eager")
        x, c = batch(5)
        for _ in range(6):
            phase = handle.phase.name
            ours = gradients(compiled, x, c)
            by_hand = gradients(model.explicit(phase, handle.masks), x, c)
            for name, gradient in by_hand.items():
                key = name if name.startswith("input") else f"_orig_mod.{name}"
                torch.testing.assert_close(ours[key], gradient, msg=lambda m, w=f"{phase}, {name}": f"{w}: {m}")
            handle.advance()
    torch._dynamo.reset()


def test_a_gate_that_the_model_is_given() -> None:
    class Given(Net):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.stem(x), c) + self.encoder.bias)

    torch.manual_seed(0)
    model = Given(GivenGate).double()
    with rdp.attach(model, 0.5, decay="constant", seed=5, example_inputs=batch(3)) as handle:
        for _ in range(6):
            x, c = batch(4)
            ours, by_hand = gradients(model, x, c), gradients(model.explicit(handle.phase.name, handle.masks), x, c)
            torch.testing.assert_close(ours, by_hand)
            handle.advance()


# -- where it cannot be ------------------------------------------------------------------------------------------------


class TwoTableGates(TableGate):
    """PixArt: the same, but the block is more than this branch."""

    sums = 2

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = super().forward(x, c)
        return self.add(1, x, (self.table - c).unsqueeze(1) * self.f(x).tanh())


class GateThatServesBoth(Block):
    """The gate scales the shortcut, too."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        g = self.gate(c).unsqueeze(1)
        return self.add(0, x, g * self.f(x)) + g


class MixedGate(GateThatServesBoth):
    """A function mixes what the gate is made of, which might be rows; and the block is more than the branch."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.add(0, x, torch.softmax(self.gate(c), 1).unsqueeze(1) * self.f(x)).tanh()


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (TwoTableGates, "parameter `blocks.0.table`"),
        (GateThatServesBoth, "is used elsewhere too"),
        (MixedGate, "made by the function `softmax`"),
    ],
)
def test_what_cannot_be_cut_is_refused_where_freeze_would_need_it(block: type[Block], told: str) -> None:
    model = Net(block).double()
    with pytest.raises(rdp.BranchError, match=f"(?s)blocks.0.f.*{told}"):
        rdp.attach(model, 0.5, example_inputs=batch(3))
    for elsewhere in ({"phases": (rdp.Phase.DROP,)}, {"mode": "batch", "freeze": "params"}):
        with rdp.attach(model, 0.5, example_inputs=batch(3), **elsewhere) as handle:
            assert {"blocks.0.f", "blocks.1.f"} == {branch.name for branch in handle.branches}


def test_a_mask_that_the_model_is_given_is_no_reason() -> None:
    """Nothing is made of it that could learn."""

    class Masked(Net):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            x, mask = self.stem(x), (c[:, :1, None] > 0).to(x.dtype)
            for block in self.blocks:
                x = x + block.f(x) * mask * c[:, :1, None]
            return self.head(x)

    with rdp.attach(Masked(ModuleGate).double(), 0.5, example_inputs=batch(3)) as handle:
        assert len(handle.branches) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_without_a_branch_its_product_is_gone(block: type[Block]) -> None:
    torch.manual_seed(0)
    model, (x, c) = Net(block).double(), batch(4)
    handle = rdp.attach(model, 0.5, example_inputs=batch(3), verify=False)
    gone = [branch.name for branch in handle.branches[::2]]
    masks = torch.tensor([[branch.name not in gone] * 4 for branch in handle.branches])
    expected = gradients(model.explicit("DROP", masks), x, c)
    with handle.without(gone):
        torch.testing.assert_close(gradients(model, x, c), expected)
    pruned = rdp.prune(handle, keep=[branch.name for branch in handle.branches if branch.name not in gone])
    kept, lost = ({name for b in handle.branches[i::2] for name in b.parameters} for i in (1, 0))
    assert dict(pruned.named_parameters()).keys() == dict(model.named_parameters()).keys() - (lost - kept)
    left = gradients(pruned, x, c)
    torch.testing.assert_close(left, {name: gradient for name, gradient in expected.items() if name in left})


@pytest.mark.parametrize("block", [ModuleGate, AdaLNZero, GivenGate], ids=lambda block: block.__name__)
def test_blocks_compiled_in_batch_mode(block: type[Block]) -> None:
    """Each with graphs for what its branches do, which cut the factors as well."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(block).double()
    with rdp.attach(model, 0.5, mode="batch", decay="constant", seed=5, example_inputs=batch(3)) as handle:
        for part in model.blocks:
            part.compile(backend="eager", fullgraph=True)
        agree(handle, model, 6)
    torch._dynamo.reset()
