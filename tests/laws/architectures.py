"""Generated residual architectures. Every residual add exists twice: in `forward`, plain, and in `oracle`, explicit.

`forward` is what a user would write and all that the library sees; `oracle` spells the same computation out with
`adds.add(S(x), F, parameters of F)` at every add whose branch can drop. `blocks` numbers the adding block of each
branch in forward order, which is what linear decay counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laws.oracle import Adds

WIDTH = 4
TOKENS = 3


class Architecture(nn.Module):
    """A model with an oracle; `row_shape` is the shape of one row of its input."""

    row_shape: tuple[int, ...]
    blocks: list[int]

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        raise NotImplementedError

    def rows(self, batch: int, seed: int) -> Tensor:
        """A batch of inputs whose first rows do not depend on its size."""
        parameter = next(self.parameters())
        rows = [
            torch.randn(self.row_shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)
            for i in range(batch)
        ]
        return torch.stack(rows).to(parameter.dtype)


# -- residual MLPs ---------------------------------------------------------------------------------------------------


class LoopMLP(Architecture):
    """The root adds: `for f in layers: x = x + f(x)`."""

    row_shape = (3,)

    def __init__(self, depth: int, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), activation()) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self.blocks = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for f in self.layers:
            x = x + f(x)
        return self.head(x)

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.stem(x)
        for f in self.layers:
            x = adds.add(x, lambda x=x, f=f: f(x), [f])
        return self.head(x)


class MLPBlock(nn.Module):
    """`x + fc2(tanh(fc1(x)))`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, WIDTH)
        self.fc2 = nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))

    def own(self) -> list[nn.Module | nn.Parameter]:
        return [self.fc1, self.fc2]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def oracle(self, x: Tensor, adds: Adds, **rows: int) -> Tensor:
        return adds.add(x, lambda: self.branch(x), self.own(), **rows)


class InPlaceMLPBlock(MLPBlock):
    """The branch output is edited in place by the add, and by an in-place activation before it."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc2(torch.tanh_(self.fc1(x)))
        out += x
        return out


class ScaledMLPBlock(MLPBlock):
    """A fixed scaling follows the last module, and no module returns the scaled value."""

    def branch(self, x: Tensor) -> Tensor:
        return 0.5 * self.fc2(torch.tanh(self.fc1(x)))


class LayerScaleMLPBlock(MLPBlock):
    """A learned scaling follows the last module: part of the branch, so frozen with it."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def branch(self, x: Tensor) -> Tensor:
        return self.gamma * super().branch(x)

    def own(self) -> list[nn.Module | nn.Parameter]:
        return [self.fc1, self.fc2, self.gamma]


class ActivatedMLPBlock(MLPBlock):
    """A functional activation with f(0) = 0 follows the last module."""

    def branch(self, x: Tensor) -> Tensor:
        return F.gelu(super().branch(x))


class MethodMLPBlock(MLPBlock):
    """Methods of tensors lie in the branch's midst, one of them with the number of rows."""

    def branch(self, x: Tensor) -> Tensor:
        heads = self.fc1(x).view(len(x), 2, WIDTH // 2).transpose(1, 2)
        return self.fc2(heads.tanh().flatten(1))


class DropoutMLPBlock(MLPBlock):
    """The branch ends in dropout: random numbers are consumed inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.25)

    def branch(self, x: Tensor) -> Tensor:
        return self.dropout(super().branch(x))


class NormMLPBlock(MLPBlock):
    """Pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(self.norm(x))

    def own(self) -> list[nn.Module | nn.Parameter]:
        return [self.norm, self.fc1, self.fc2]


class PostActivationMLPBlock(MLPBlock):
    """`gelu(x + f(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.branch(x))

    def oracle(self, x: Tensor, adds: Adds, **rows: int) -> Tensor:
        return F.gelu(super().oracle(x, adds, **rows))


MLP_BLOCKS = {
    "plain": MLPBlock,
    "in_place": InPlaceMLPBlock,
    "scaled": ScaledMLPBlock,
    "layer_scale": LayerScaleMLPBlock,
    "activated": ActivatedMLPBlock,
    "method": MethodMLPBlock,
    "dropout": DropoutMLPBlock,
    "norm": NormMLPBlock,
    "post_activation": PostActivationMLPBlock,
}


class BlockMLP(Architecture):
    """A stem, blocks of the named kinds, a head."""

    row_shape = (3,)

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.body = nn.Sequential(*(MLP_BLOCKS[kind]() for kind in kinds))
        self.head = nn.Linear(WIDTH, 2)
        self.blocks = list(range(len(kinds)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = block.oracle(x, adds)
        return self.head(x)


class FoldedMLP(Architecture):
    """The blocks see batch and tokens folded into one axis: a row is `TOKENS` consecutive entries."""

    row_shape = (TOKENS, 3)

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.body = nn.Sequential(*(MLPBlock() for _ in range(depth)))
        self.head = nn.Linear(WIDTH, 2)
        self.blocks = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        folded = self.body(self.stem(x).flatten(0, 1))
        return self.head(folded.unflatten(0, (-1, TOKENS)))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.stem(x).flatten(0, 1)
        for block in self.body:
            x = block.oracle(x, adds, repeat=TOKENS)
        return self.head(x.unflatten(0, (-1, TOKENS)))


class SharedMLP(Architecture):
    """The same blocks several times over, as in ALBERT: their sums share weights, and so the mask."""

    row_shape = (3,)

    def __init__(self, depth: int, rounds: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.body = nn.ModuleList(MLPBlock() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self.rounds = rounds
        self.blocks = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.rounds):
            for block in self.body:
                x = block(x)
        return self.head(x)

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.stem(x)
        for _ in range(self.rounds):
            for block in self.body:
                x = block.oracle(x, adds)
        return self.head(x)


# -- convolutional blocks --------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """torchvision's BasicBlock: in-place ReLU, in-place add, a projection where the shape changes."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = projection(inputs, width, stride)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))

    def own(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.conv2, self.bn2]

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.branch(x)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return torch.relu(adds.add(identity, lambda: self.branch(x), self.own()))


class Bottleneck(BasicBlock):
    """torchvision's Bottleneck."""

    expansion = 2

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        nn.Module.__init__(self)
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, width * self.expansion, 1), nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inputs, width * self.expansion, stride)

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))

    def own(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]


class PreActBlock(nn.Module):
    """Pre-activation: a projection reads the activated input, so the first norm is then no part of the branch."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.downsample = None if stride == 1 and inputs == width else conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        def activate() -> Tensor:
            return F.relu(self.bn1(x))

        def convolve(activated: Tensor) -> Tensor:
            return self.conv2(F.relu(self.bn2(self.conv1(activated))))

        own = [self.conv1, self.bn2, self.conv2]
        if self.downsample is None:
            return adds.add(x, lambda: convolve(activate()), [self.bn1, *own])
        activated = activate()
        return adds.add(self.downsample(activated), lambda: convolve(activated), own)


CONV_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck, "preact": PreActBlock}


class ConvNet(Architecture):
    """A tiny ResNet. `strides` has one entry per block; a stride of 2 also doubles the width."""

    row_shape = (2, 4, 4)

    def __init__(self, kind: str, strides: tuple[int, ...]) -> None:
        super().__init__()
        block = CONV_BLOCKS[kind]
        width, inputs = 2, 2
        self.conv1, self.bn1 = conv(2, inputs, 3), nn.BatchNorm2d(inputs)
        body = []
        for stride in strides:
            width *= stride
            body.append(block(inputs, width, stride))
            inputs = width * block.expansion
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(inputs, 2)
        self.blocks = list(range(len(strides)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.fc(x.mean((2, 3)))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for block in self.body:
            x = block.oracle(x, adds)
        return self.fc(x.mean((2, 3)))


# -- transformers ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention over tokens, `Tensor[N, tokens, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.transpose(-2, -1) / WIDTH**0.5).softmax(-1) @ v)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class PreNormBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = adds.add(x, lambda x=x: self.attn(self.norm1(x)), [self.norm1, self.attn])
        return adds.add(x, lambda: self.mlp(self.norm2(x)), [self.norm2, self.mlp])


class PostNormBlock(PreNormBlock):
    """`norm1(x + attn(x))`, then `norm2(x + mlp(x))`: the norms are no part of the branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.norm1(adds.add(x, lambda x=x: self.attn(x), [self.attn]))
        return self.norm2(adds.add(x, lambda: self.mlp(x), [self.mlp]))


class TupleAttentionBlock(PreNormBlock):
    """`nn.MultiheadAttention` returns a tuple; its first element is the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        return self.attn(x, x, x)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.mlp(self.norm2(x))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = adds.add(x, lambda x=x: self.attend(x), [self.norm1, self.attn])
        return adds.add(x, lambda: self.mlp(self.norm2(x)), [self.norm2, self.mlp])


class ParallelBlock(nn.Module):
    """`x + attn(norm(x)) + mlp(norm(x))`: two branches of one block that share a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attn(h) + self.mlp(h)

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        h = self.norm(x)
        first = adds.add(x, lambda: self.attn(h), [self.attn], shared=[self.norm])
        return adds.add(first, lambda: self.mlp(h), [self.mlp], shared=[self.norm])


TRANSFORMER_BLOCKS = {
    "pre_norm": PreNormBlock,
    "post_norm": PostNormBlock,
    "tuple_attention": TupleAttentionBlock,
    "parallel": ParallelBlock,
}


class Transformer(Architecture):
    """Token embedding, blocks of one kind, a pooled head; with a position embedding, which is no residual branch."""

    row_shape = (TOKENS, 3)

    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.position = nn.Parameter(0.1 * torch.ones(1, TOKENS, WIDTH))
        self.body = nn.ModuleList(TRANSFORMER_BLOCKS[kind]() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self.blocks = [block for block in range(depth) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.body:
            x = block(x)
        return self.head(x.mean(1))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.body:
            x = block.oracle(x, adds)
        return self.head(x.mean(1))


class TorchTransformer(Architecture):
    """`nn.TransformerEncoderLayer`, which in eval mode takes a fused path without adds; optionally rows on axis 1."""

    row_shape = (TOKENS, 3)

    def __init__(self, depth: int, norm_first: bool, batch_first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.axis = 0 if batch_first else 1
        self.embed = nn.Linear(3, WIDTH)
        self.body = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout, norm_first=norm_first, batch_first=batch_first)
            for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 2)
        self.blocks = [block for block in range(depth) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, self.axis)
        for block in self.body:
            x = block(x)
        return self.head(x.mean(1 - self.axis))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.embed(x).transpose(0, self.axis)
        for b in self.body:
            attend = [b.self_attn, *([b.norm1] if b.norm_first else [])]
            feed = [b.linear1, b.linear2, *([b.norm2] if b.norm_first else [])]
            if b.norm_first:
                x = adds.add(x, lambda x=x, b=b: self.attend(b, b.norm1(x)), attend, axis=self.axis)
                x = adds.add(x, lambda x=x, b=b: self.feed(b, b.norm2(x)), feed, axis=self.axis)
            else:
                x = b.norm1(adds.add(x, lambda x=x, b=b: self.attend(b, x), attend, axis=self.axis))
                x = b.norm2(adds.add(x, lambda x=x, b=b: self.feed(b, x), feed, axis=self.axis))
        return self.head(x.mean(1 - self.axis))

    @staticmethod
    def attend(b: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        return b.dropout1(b.self_attn(x, x, x, need_weights=False)[0])

    @staticmethod
    def feed(b: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        return b.dropout2(b.linear2(b.dropout(b.activation(b.linear1(x)))))


# -- nested branches -------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """`z + f(z)`, inside somebody else's branch."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.f(z)


class NestedBlock(nn.Module):
    """`x + tail(inner(neck(x)))`. The outer branch drops, unless the inner one holds most of its parameters."""

    def __init__(self, inner_heavy: bool) -> None:
        super().__init__()
        self.inner_heavy = inner_heavy
        outer, inner = (1, 32) if inner_heavy else (16, 1)
        self.neck = nn.Sequential(nn.Linear(WIDTH, outer), nn.Tanh(), nn.Linear(outer, WIDTH))
        self.inner = Inner(inner)
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.inner(self.neck(x)))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        if not self.inner_heavy:
            return adds.add(x, lambda: self.tail(self.inner(self.neck(x))), [self.neck, self.inner, self.tail])
        z = self.neck(x)
        return x + self.tail(adds.add(z, lambda: self.inner.f(z), [self.inner.f]))


class NestedMLP(Architecture):
    """Branches inside branches."""

    row_shape = (3,)

    def __init__(self, inner_heavy: tuple[bool, ...]) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.body = nn.Sequential(*(NestedBlock(heavy) for heavy in inner_heavy))
        self.head = nn.Linear(WIDTH, 2)
        self.blocks = list(range(len(inner_heavy)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def oracle(self, x: Tensor, adds: Adds) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = block.oracle(x, adds)
        return self.head(x)
