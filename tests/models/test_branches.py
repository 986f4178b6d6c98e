"""Residual branches in every form that code gives them: each is found under the right name, kind and parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.found import find
from models.semantics import check_gating

pytestmark = pytest.mark.filterwarnings("error::rdp.RdpWarning")

DIM = 8


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))


class Block(nn.Module):
    """A block whose forward is `body(self, x)`, with a few layers to take from."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def net(body: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> nn.Sequential:
    """The block between a stem and a head."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Linear(DIM, DIM), block=Block(body, **layers), head=nn.Sequential(nn.GELU(), nn.Linear(DIM, 3))
        )
    )


class Pair(nn.Module):
    """Returns a tuple: its input, and a function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x.mean(), {"out": torch.sigmoid(self.f(x))}


def names(*layers: str) -> list[str]:
    """The parameters of `mlp()`s of these names in the block."""
    return [f"block.{layer}.{i}.{kind}" for layer in layers for i in (0, 2) for kind in ("weight", "bias")]


@dataclass
class Case:
    """A block and the branches in it: name, kind, parameters."""

    model: Callable[[], nn.Module]
    branches: list[tuple[str, str, list[str]]]
    shape: tuple[int, ...] = (DIM,)


def scaled(s: Any, x: Tensor) -> Tensor:
    return x + 0.5 * s.f(s.norm(x)).view_as(x)


def in_place(s: Any, x: Tensor) -> Tensor:
    out = s.f(x)
    out += x
    return out.relu_()


class Mix(nn.Module):
    """A sum in a module of its own that keeps the magnitude, as in EDM2 (Karras et al. 2024)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (0.7 * a + 0.3 * b) / 0.58**0.5


def skip(s: Any, x: Tensor) -> Tensor:
    y = s.short(x) + s.f(x)
    return s.out(torch.cat([y, s.g(y)], dim=-1))


def checkpointed_name(s: Any, x: Tensor) -> Tensor:
    for layer in s.layers:
        x = x + layer(x)
    return x


CASES = {
    "pre-norm": Case(
        lambda: net(lambda s, x: x + s.f(s.norm(x)), norm=nn.LayerNorm(DIM), f=mlp()),
        [("block.f", "identity", ["block.norm.weight", "block.norm.bias", *names("f")])],
    ),
    "post-norm": Case(
        lambda: net(lambda s, x: s.norm(s.f(x) + x), norm=nn.LayerNorm(DIM), f=mlp()),
        [("block.f", "identity", names("f"))],
    ),
    "in place": Case(lambda: net(in_place, f=mlp()), [("block.f", "identity", names("f"))]),
    "two in a row": Case(
        lambda: net(lambda s, x: (x := x + s.f(x)) + s.g(x), f=mlp(), g=mlp()),
        [("block.f", "identity", names("f")), ("block.g", "identity", names("g"))],
    ),
    "in a loop": Case(
        lambda: net(checkpointed_name, layers=nn.ModuleList([mlp(), mlp()])),
        [(f"block.layers.{i}", "identity", names(f"layers.{i}")) for i in range(2)],
    ),
    "parallel": Case(
        lambda: net(lambda s, x: x + s.f(x) + s.g(x), f=mlp(), g=mlp()),
        [("block.f", "identity", names("f")), ("block.g", "parallel", names("g"))],
    ),
    "projection": Case(
        lambda: net(lambda s, x: F.relu(s.short(x) + s.f(x)), short=nn.Linear(DIM, DIM), f=mlp()),
        [("block.f", "projection", names("f"))],
    ),
    "projection last": Case(
        lambda: net(lambda s, x: s.f(x) + s.short(x), f=mlp(), short=nn.Linear(DIM, DIM)),
        [("block.f", "projection", names("f"))],
    ),
    "projection, mixed by a module": Case(
        lambda: net(lambda s, x: s.mix(s.f(x), s.short(x)), f=mlp(), short=nn.Linear(DIM, DIM), mix=Mix()),
        [("block.f", "projection", names("f"))],
    ),
    "projection, also concatenated": Case(
        lambda: net(skip, short=nn.Linear(DIM, DIM), f=mlp(), g=mlp(), out=nn.Linear(2 * DIM, DIM)),
        [("block.f", "projection", names("f"))],
    ),
    "scaled, reshaped": Case(
        lambda: net(scaled, norm=nn.LayerNorm(DIM), f=mlp()),
        [("block.f", "identity", ["block.norm.weight", "block.norm.bias", *names("f")])],
    ),
    "drop path": Case(
        lambda: net(lambda s, x: x + s.drop_path(s.f(x)), f=mlp(), drop_path=nn.Identity()),
        [("block.drop_path", "identity", names("f"))],
    ),
    "relu": Case(lambda: net(lambda s, x: x + F.relu(s.f(x)), f=mlp()), [("block.f", "identity", names("f"))]),
    "permuted": Case(
        lambda: net(lambda s, x: x + s.f(x.transpose(1, 2)).transpose(1, 2), f=mlp()),
        [("block.f", "identity", names("f"))],
        shape=(DIM, DIM),
    ),
    "concatenated": Case(
        lambda: net(
            lambda s, x: x + torch.cat([s.f(x)[..., : DIM // 2], s.g(x)[..., DIM // 2 :]], dim=-1), f=mlp(), g=mlp()
        ),
        [("block.g", "identity", names("f", "g"))],
    ),
    "function at the end": Case(
        lambda: net(lambda s, x: x + torch.sigmoid(s.f(x)), f=mlp()), [("block", "identity", names("f"))]
    ),
    "tuple output": Case(
        lambda: net(lambda s, x: x + s.pair(x)[1]["out"], pair=Pair()),
        [("block.pair", "identity", names("pair.f"))],
    ),
    "tokens folded into the batch": Case(
        lambda: net(lambda s, x: x + s.f(x.flatten(0, 1)).view_as(x), f=mlp()),
        [("block.f", "identity", names("f"))],
        shape=(5, DIM),
    ),
}  # fmt: skip


def inputs(case: Case, rows: int = 2) -> Tensor:
    return torch.randn(rows, *case.shape)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exactly_the_branches_of_the_block_are_found(case: Case) -> None:
    found = find(case.model(), inputs(case))
    assert [(b.name, b.kind, sorted(b.parameters)) for b in found.branches] == [
        (name, kind, sorted(parameters)) for name, kind, parameters in case.branches
    ]
    assert {b.block.split(".")[0] for b in found.branches} == {"block"}
    assert found.refused == ()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gating_the_block_is_exact(case: Case) -> None:
    torch.manual_seed(0)
    assert check_gating(case.model(), {"input": inputs(case)}) == []


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_same_is_found_without_numbers(case: Case) -> None:
    with torch.device("meta"):
        shapes = find(case.model(), inputs(case))
    assert shapes == find(case.model(), inputs(case))


def test_the_outer_branch_is_gated_where_it_holds_most_parameters() -> None:
    inner = Block(lambda s, x: x + s.f(x), f=nn.Linear(DIM, DIM))
    found = find(net(lambda s, x: x + s.f(x), f=nn.Sequential(mlp(), inner, mlp())), torch.randn(2, DIM))
    assert [b.name for b in found.branches] == ["block.f"]


def test_the_inner_branches_are_gated_where_they_hold_most_parameters() -> None:
    inner = [Block(lambda s, x: x + s.f(x), f=mlp()) for _ in range(2)]
    found = find(net(lambda s, x: x + s.f(x), f=nn.Sequential(nn.LayerNorm(DIM), *inner)), torch.randn(2, DIM))
    assert [b.name for b in found.branches] == ["block.f.1.f", "block.f.2.f"]


def test_calls_that_share_weights_are_one_branch() -> None:
    model = net(lambda s, x: (x := x + s.f(x)) + s.f(x), f=mlp())
    (branch,) = find(model, torch.randn(2, DIM)).branches
    assert (branch.name, branch.sums, sorted(branch.parameters)) == ("block.f", 2, sorted(names("f")))
    assert check_gating(model, {"input": torch.randn(2, DIM)}) == []


def test_a_shared_norm_belongs_to_both_parallel_branches() -> None:
    model = net(lambda s, x: x + s.f(s.norm(x)) + s.g(s.norm(x)), norm=nn.LayerNorm(DIM), f=mlp(), g=mlp())
    found = find(model, torch.randn(2, DIM)).branches
    assert [b.name for b in found] == ["block.f", "block.g"]
    assert all({"block.norm.weight", "block.norm.bias"} <= set(b.parameters) for b in found)


def test_parameters_that_are_used_outside_too_belong_to_no_branch() -> None:
    model = net(lambda s, x: x + s.f(x), f=mlp())
    model.head[1] = nn.Linear(DIM, DIM)
    model.head[1].weight = model.block.f[0].weight
    (branch,) = find(model, torch.randn(2, DIM)).branches
    assert sorted(branch.parameters) == sorted(set(names("f")) - {"block.f.0.weight"})


class CrossAttention(nn.Module):
    """Queries from the stream, keys and values from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 2)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x, memory = self.stem(x), self.memory(memory)
        y = F.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory))
        return self.head(x + self.out(y)), memory


def test_keys_and_values_of_a_cross_attention_belong_to_its_branch() -> None:
    found = find(CrossAttention(), (torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)))
    (branch,) = found.branches
    assert {p.split(".")[0] for p in branch.parameters} == {"q", "k", "v", "out"}


class Sequence(nn.Module):
    """Works on (time, batch, features), as XLNet does, and takes keywords only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f = nn.Linear(DIM, DIM), mlp()

    def forward(self, *, tokens: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.stem(tokens.transpose(0, 1))
        return {"out": (x + self.f(x) * scale).transpose(0, 1)}


def test_the_batch_may_be_another_axis_and_inputs_may_be_keywords() -> None:
    (branch,) = find(Sequence(), {"tokens": torch.randn(4, 5, DIM), "scale": 2.0}).branches
    assert branch.name == "f"
    assert [(gate.rows.axis, gate.rows.fold) for gate in branch.gates] == [(1, 1)]
    assert check_gating(Sequence(), {"tokens": torch.randn(2, 5, DIM)}) == []


def test_folded_tokens_follow_the_mask_of_their_row() -> None:
    case = CASES["tokens folded into the batch"]
    (branch,) = find(case.model(), inputs(case)).branches
    assert [(gate.rows.axis, gate.rows.fold) for gate in branch.gates] == [(0, 5)]


REFUSED = {
    "also feeds something other than the residual sum": lambda s, x: torch.cat([x + (y := s.f(x)), y], dim=-1),
    "values inside the branch, before `block.f`, also reach the model's output": lambda s, x: torch.cat(
        [x + s.f(y := s.g(x)), y], dim=-1
    ),
    "is called 2 times in a forward, 1 of them at the end of a branch": lambda s, x: x + s.f(s.g(s.f(x))),
    "no module returns what is added; the branch ends in the function `sigmoid`": lambda s, x: F.relu(
        x + torch.sigmoid(s.f(x))
    ),
    "the sum weighs both, shortcut and branch": lambda s, x: torch.lerp(x, s.f(x), torch.sigmoid(s.g(x))),
    "block.g.0.bias'] are applied after `block.f`": lambda s, x: torch.lerp(x, s.f(x), s.g[0].bias),
    "the branch ends in the function `div`": lambda s, x: F.relu(x + s.f(x) / s.g(x).exp()),
    "the branch ends in the function `einsum`": lambda s, x: F.relu(x + torch.einsum("nd,d->nd", s.f(x), s.g[0].bias)),
}


@pytest.mark.parametrize(
    ("reason", "body"),
    REFUSED.items(),
    ids=[
        "leaky end",
        "leaky inside",
        "called twice",
        "no seam",
        "lerp by data",
        "lerp by weight",
        "quotient",
        "einsum",
    ],
)
def test_what_cannot_be_gated_soundly_is_refused_with_the_reason(reason: str, body: Callable[..., Tensor]) -> None:
    model = net(body, f=mlp(), g=mlp())
    model.head = nn.Sequential(nn.GELU(), nn.LazyLinear(3))
    model(torch.randn(2, DIM))
    found = find(model, torch.randn(2, DIM))
    assert found.branches == ()
    (refusal,) = found.refused
    assert reason in refusal.reason
    assert refusal.block == "block"


def test_naming_a_refused_branch_gates_it() -> None:
    model = net(lambda s, x: x + s.f(s.g(s.f(x))), f=mlp(), g=mlp())
    found = find(model, torch.randn(2, DIM), branches=["block.f"])
    assert ([b.name for b in found.branches], found.refused) == (["block.f"], ())


def test_a_sum_in_the_midst_of_the_stream_that_is_no_residual_one_is_named() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        x = x + s.f(x)
        z = torch.sigmoid(s.gate(x))
        x = z * x + (1 - z) * s.h(x)
        return x + s.g(x)

    found = find(net(body, f=mlp(), g=mlp(), h=mlp(), gate=mlp()), torch.randn(2, DIM))
    assert [b.name for b in found.branches] == ["block.f", "block.g"]
    (refusal,) = found.refused
    assert refusal.block == "block"
    assert "in the midst of the residual stream is none by itself, as both operands are nonlinear" in refusal.reason


def test_a_branch_that_is_smaller_than_the_stream_is_named() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        x = x + s.f(x)
        x = x + s.g(x).mean(1, keepdim=True)
        return x + s.h(x)

    found = find(net(body, f=mlp(), g=mlp(), h=mlp()), torch.randn(2, 3, DIM))
    assert [b.name for b in found.branches] == ["block.f", "block.h"]
    (refusal,) = found.refused
    assert "in the midst of the residual stream is none by itself, as what is added broadcasts" in refusal.reason


class RouterLoss(nn.Module):
    """A mixture of experts: the router is in the branches, and has a loss of its own over all layers."""

    def __init__(self, two_outputs: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 2)
        self.routers = nn.ModuleList(nn.Linear(DIM, 2) for _ in range(2))
        self.layers = nn.ModuleList(self.Experts() for _ in range(2))
        self.two_outputs = two_outputs

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(mlp() for _ in range(2))

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, logits = self.stem(x), []
        for router, layer in zip(self.routers, self.layers, strict=True):
            logits.append(router(x))
            x = x + layer(x, logits[-1].softmax(-1))
        balance = torch.cat(logits).softmax(-1).mean(0).square().sum()
        return (self.head(x), balance) if self.two_outputs else self.head(x) + balance


@pytest.mark.parametrize("two_outputs", [True, False])
def test_a_router_with_a_loss_of_its_own_is_no_part_of_the_branch(two_outputs: bool) -> None:
    model, x = RouterLoss(two_outputs), torch.randn(2, DIM)
    found = find(model, x)
    assert ([b.name for b in found.branches], found.refused) == (["layers.0", "layers.1"], ())
    for branch in found.branches:
        assert {name.split(".")[0] for name in branch.parameters} == {"layers"}
        assert branch.note.startswith("values inside of it are also used beside the residual stream")
    assert two_outputs is False or check_gating(model, {"x": x}) == []
