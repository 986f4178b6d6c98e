"""Additions that are not residual: each is looked at, and nothing is gated because of it."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rdp
from models.found import find


def conv(inputs: int, outputs: int | None = None, stride: int = 1) -> nn.Sequential:
    outputs = outputs or inputs
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """One true residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class FeaturePyramid(nn.Module):
    """Lateral connection plus the upsampled coarser map."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 8), conv(8, 16, 2)
        self.lateral, self.top = nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)
        self.smooth = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        top = self.top(self.coarse(fine))
        return self.smooth(self.lateral(fine) + F.interpolate(top, scale_factor=2.0))


class AddingUNet(nn.Module):
    """A U-Net of residual blocks whose long skips add instead of concatenating."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = conv(3, 8), conv(8, 8, 2), nn.ConvTranspose2d(8, 8, 2, 2)
        self.block, self.head = Residual(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.up(self.block(self.down(x))))


class Positions(nn.Module):
    """Learned position embeddings, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 9, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.embed(x)), dim=1)
        return self.head(x + self.positions)


class Biases(nn.Module):
    """Biases and buffers that are added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(8))
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x) + self.bias) + self.offset
        return x + 1


class Res2NetSplit(nn.Module):
    """The hierarchical sums inside a Res2Net bottleneck, without the residual connection around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.convs = conv(3, 12), nn.ModuleList(conv(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.stem(x).chunk(3, dim=1))
        for i, layer in enumerate(self.convs):
            parts[i + 1] = layer(parts[i + 1] + parts[i])
        return torch.cat(parts, dim=1)


class RepVgg(nn.Module):
    """Linear branches that merge into one convolution after training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.three = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.one = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.identity = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.three(x) + self.one(x) + self.identity(x))


class NasNetCell(nn.Module):
    """Pairs of operations whose sums are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.left, self.right = nn.ModuleList(conv(8) for _ in range(2)), nn.ModuleList(conv(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([left(x) + right(x) for left, right in zip(self.left, self.right, strict=True)], dim=1)


class TwoTowers(nn.Module):
    """The sum of two independent networks."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8), conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Fuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, near: Tensor, far: Tensor) -> Tensor:
        return self.near(near) + self.far(far)


class Fusion(nn.Module):
    """HRNet's fusion of two paths, in a module that runs neither of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near, self.far, self.fuse = conv(3, 8), nn.Conv2d(8, 8, 1), conv(8), Fuse()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fuse(self.near(x), self.far(x))


class Mixed(nn.Module):
    """Sums of two things alike, of whole numbers, and of shapes that are not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(self.linear(x))
        spectrum = spectrum + torch.fft.fft(self.linear(x).tanh())
        classes = self.linear(x).argmax(1) + self.linear(x).argmin(1)
        return spectrum.real + self.linear(x).mean(1, keepdim=True) + classes[:, None]


class NoParameters(nn.Module):
    """An unlearned branch: there is nothing in it to freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool, self.head = conv(3, 8), nn.AvgPool2d(3, 1, 1), conv(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.pool(x))


class Forecast(nn.Module):
    """Steps to come of a series whose mean is taken away before and added back in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = x - mean
        deviation = x.std(1, keepdim=True)
        y = self.layers((x / deviation).transpose(1, 2)).transpose(1, 2)
        return y * deviation[:, 0, :].unsqueeze(1).repeat(1, 4, 1) + mean[:, 0, :].unsqueeze(1).repeat(1, 4, 1)


class ForecastFromLast(Forecast):
    """The last value takes the place of the mean, and a module returns what it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1:, :]
        y = self.layers((x - last).transpose(1, 2))
        return y + last.transpose(1, 2).expand(-1, -1, 4)


class ForecastInPlace(Forecast):
    """For each channel as a row, in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(0, 1).clone()
        median = x.median(-1, keepdim=True).values
        x -= median
        return self.layers(x).mul_(2).add_(median.expand(-1, 4))


IMAGE = torch.randn(2, 3, 8, 8)
ADDED_BACK = "statistics of the input are added back"
CASES = [
    (FeaturePyramid, IMAGE, ["long skip over a resampled path"]),
    (Positions, torch.randn(2, 8, 8), ["adds a constant"]),
    (Biases, torch.randn(2, 8), ["adds a constant"]),
    (Res2NetSplit, IMAGE, ["both operands are linear", "operands are parts of one split tensor"]),
    (RepVgg, IMAGE, ["both operands are linear"]),
    (NasNetCell, IMAGE, ["both operands are nonlinear"]),
    (TwoTowers, IMAGE, ["both operands are nonlinear"]),
    (Fusion, IMAGE, ["branch does not run inside the adding module"]),
    (Mixed, torch.randn(2, 8), ["both operands are nonlinear", "is no floating point", "what is added broadcasts"]),
    (NoParameters, IMAGE, ["branch has no parameters"]),
    *((kind, torch.randn(2, 8, 3), [ADDED_BACK]) for kind in (Forecast, ForecastFromLast, ForecastInPlace)),
]


@pytest.mark.parametrize(("kind", "x", "reasons"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_an_addition_that_is_not_residual_is_neither_gated_nor_reported(
    kind: type[nn.Module], x: Tensor, reasons: list[str]
) -> None:
    assert find(kind(), x) == ((), ())


@pytest.mark.parametrize(("kind", "x", "reasons"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_attaching_to_a_model_without_branches_says_what_was_looked_at(
    kind: type[nn.Module], x: Tensor, reasons: list[str]
) -> None:
    with pytest.raises(rdp.BranchError, match=f"no residual branch to gate in {kind.__name__}: ") as error:
        rdp.attach(kind(), example_inputs=x)
    number, listed = re.search(r"(\d+) additions were looked at \((.*?)\)\. If", str(error.value)).groups()
    counts = [item.split("x ", 1) for item in listed.split(", ")]
    assert [reason for _, reason in counts] == reasons
    assert sum(int(count) for count, _ in counts) == int(number)


class Autoencoder(Forecast):
    """Returns its error, which is a difference of x and what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.layers(x)) / 2).square().mean()


class Increment(Autoencoder):
    """What x would have to be changed by."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) - x).tanh()


class StraightThrough(Autoencoder):
    """Vector quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        nearest = torch.cdist(z, self.codes.weight.expand(len(z), -1, -1)).argmin(-1)
        return (z + (self.codes(nearest) - z).detach()).tanh()


class TimeLoop(Autoencoder):
    """RWKV's: numbers that decay are carried from step to step, relative to the largest."""

    def forward(self, x: Tensor) -> Tensor:
        keys, state, largest = self.layers(x), torch.zeros_like(x[:, 0]), torch.full_like(x[:, 0], -9.0)
        decay = self.layers[0].bias.exp().mean()
        for key in keys.unbind(1):
            new = torch.maximum(largest + decay, key)
            state = torch.exp(largest + decay - new) * state + torch.exp(key - new)
            largest = new
        return state


class TwoHeads(Autoencoder):
    """VOLO's: one head for the first token, one for the others, whose largest values are added."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x).tanh()
        return self.layers[0](x[:, 0]) + 0.5 * self.layers[0](x[:, 1:]).max(1).values


@pytest.mark.parametrize("kind", [Autoencoder, Increment, StraightThrough, TimeLoop, TwoHeads])
def test_a_sum_or_difference_that_is_no_residual_sum_is_neither_gated_nor_reported(kind: type[nn.Module]) -> None:
    assert find(kind(), torch.randn(2, 8, 3)) == ((), ())


class Decoder(nn.Module):
    """DETR's decoder layer: learned queries are added to the input of attention, and are no residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.embed = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention, self.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        position = self.query(x)
        hidden = self.embed(x)
        hidden = hidden + self.attention(hidden + position)
        return hidden + self.mlp(hidden + position)


def test_query_positions_are_side_inputs() -> None:
    found = find(Decoder(), torch.randn(2, 5, 8))
    assert [b.name for b in found.branches] == ["attention", "mlp"]


def test_a_long_skip_around_residual_blocks_is_left_alone() -> None:
    assert [b.name for b in find(AddingUNet(), IMAGE).branches] == ["block.f"]


def test_a_residual_connection_around_rejected_sums_is_found() -> None:
    class Bottleneck(Res2NetSplit):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.last(super().forward(x)) + self.first(x))

    model = Bottleneck()
    model.first, model.last, model.act = nn.Conv2d(3, 12, 1), conv(12)[:2], nn.ReLU()
    assert [(b.name, b.kind) for b in find(model, IMAGE).branches] == [("last", "projection")]
