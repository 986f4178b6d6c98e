"""Features of any attached model, and a model that is afterwards exactly as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rdp
from rdp.analysis import extract_features, grid, spiral


class Block(nn.Module):
    """The sum stands in a block of its own; an in-place ReLU follows it, as in a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.f = nn.BatchNorm1d(width), nn.Linear(width, width)
        self.dropout, self.relu = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(self.dropout(self.norm(x)))
        out += x
        return self.relu(out)


class Loop(nn.Module):
    """The sums stand in a loop of the model, and functions follow the gated module."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.fs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, points: Tensor) -> Tensor:
        x = self.stem(points)
        for f in self.fs:
            x = x + f(x).reshape(len(x), 1, -1).squeeze(1) * 0.5
        return x


class Parallel(nn.Module):
    """Two branches in one sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.g(x)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 8))
def test_layers_are_the_residual_sums(seed: int, depth: int, width: int) -> None:
    torch.manual_seed(seed)
    model, x = Loop(width, depth), torch.randn(7, 3)
    features = extract_features(rdp.attach(model, example_inputs=x), x)
    assert list(features) == ["input", *(f"fs.{i}" for i in range(depth))]
    with torch.no_grad():
        value = model.stem(x)
        torch.testing.assert_close(features["input"], value)
        for f, layer in zip(model.fs, list(features.values())[1:], strict=True):
            value = value + f(value) * 0.5
            torch.testing.assert_close(layer, value)


def test_a_sum_that_is_overwritten_in_place_was_kept() -> None:
    model, x = nn.Sequential(Block(4), Block(4)), torch.randn(9, 4)
    features = extract_features(rdp.attach(model, example_inputs=x), x)
    model.eval()
    first = model[0].f(model[0].norm(x)) + x
    torch.testing.assert_close(features["0.f"], first)
    assert (features["0.f"] < 0).any()  # the ReLU after it would have removed these
    torch.testing.assert_close(features["input"], x)
    second = model[1].f(model[1].norm(first.relu())) + first.relu()
    torch.testing.assert_close(features["1.f"], second)


def test_parallel_branches_end_in_their_own_partial_sums() -> None:
    model, x = Parallel(4), torch.randn(6, 4)
    features = extract_features(rdp.attach(model, example_inputs=x), x)
    with torch.no_grad():
        torch.testing.assert_close(features["f"], x + model.f(x))
        torch.testing.assert_close(features["g"], x + model.f(x) + model.g(x))


def state_of(model: nn.Module, handle: rdp.ResidualDropPath) -> dict[str, object]:
    """Everything about a model that extraction could change."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
            for module in model.modules()
        ],
        "rng": torch.get_rng_state(),
        "handle": (handle.phase, handle.step_count, handle.masks.clone(), handle.state_dict()),
    }


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


@pytest.mark.parametrize("fails", [False, True])
def test_extraction_leaves_no_trace(fails: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(4), Block(4), Block(4)), torch.randn(9, 4)
    handle = rdp.attach(model, 0.5, example_inputs=x)
    model.train()
    model[1].eval()  # a frozen part stays frozen
    model(x).sum().backward()
    before = state_of(model, handle)
    if fails:
        with pytest.raises(rdp.ArgumentError, match="NaN"):
            extract_features(handle, x * torch.nan)
    else:
        extract_features(handle, x)
    assert_same(state_of(model, handle), before)
    torch.manual_seed(1)
    after = model(x)
    handle.remove()
    torch.manual_seed(1)
    assert after.shape == model(x).shape


def test_training_goes_on_as_if_nothing_was_extracted() -> None:
    def train(look: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, x = nn.Sequential(Block(4), Block(4), nn.Linear(4, 2)), torch.randn(32, 4)
        handle = rdp.attach(model, 0.5, example_inputs=x)
        optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if look:
                extract_features(handle, x)
            loss.backward()
            if look:
                extract_features(handle, x[:5])
            optimizer.step()
        return model.state_dict()

    assert_same(train(True), train(False))


@pytest.mark.parametrize(
    ("name", "layers", "shape"),
    [
        ("resnet50", 17, (2, 2048, 2, 2)),
        ("vit_tiny_patch16_224", 25, (2, 17, 192)),
        ("swin_tiny_patch4_window7_224", 25, None),
    ],
)
def test_any_attached_model_has_features(name: str, layers: int, shape: tuple[int, ...] | None) -> None:
    options = {"resnet50": {}, "vit_tiny_patch16_224": {"img_size": 64}}.get(
        name, {"img_size": 56, "drop_path_rate": 0.0}
    )
    size = options.get("img_size", 64)
    model, x = timm.create_model(name, **options), torch.randn(2, 3, size, size)
    handle = rdp.attach(model, example_inputs=x)
    features = extract_features(handle, (x,))
    assert list(features) == ["input", *(branch.name for branch in handle.branches)]
    assert len(features) == layers
    if shape is not None:
        assert features[handle.branches[-1].name].shape == shape
    assert {len(values) for values in features.values()} == {2}


def removed() -> rdp.ResidualDropPath:
    handle = rdp.attach(Loop(4, 2), example_inputs=torch.randn(2, 3))
    handle.remove()
    return handle


@pytest.mark.parametrize(
    ("handle", "inputs", "message"),
    [
        (lambda: Loop(4, 2), torch.ones(2, 3), r"got the model \(Loop\).*rdp.attach\(model\)"),
        (lambda: "model", torch.ones(2, 3), "what rdp.attach.* returned; got str"),
        (removed, torch.ones(2, 3), "removed from its model"),
        (lambda: rdp.attach(Loop(4, 2)), torch.ones(2, 3), "not known yet.*handle.discover"),
        (lambda: rdp.attach(Loop(4, 2), example_inputs=torch.ones(2, 3)), torch.ones(0, 3), "inputs is empty"),
        (
            lambda: rdp.attach(Loop(4, 2), example_inputs=torch.ones(2, 3)),
            torch.full((2, 3), torch.nan),
            "after 'input' hold NaN.*diverged",
        ),
    ],
)
def test_what_is_wrong_is_said(handle: Callable[[], object], inputs: Tensor, message: str) -> None:
    with pytest.raises(rdp.ArgumentError, match=message):
        extract_features(handle(), inputs)


@given(st.integers(1, 500), st.integers(0, 2**31))
def test_spirals_are_rotations_of_each_other(samples: int, seed: int) -> None:
    points, labels = spiral(samples, seed=seed)
    assert points.shape == (samples, 2)
    assert labels.sum() == samples // 2
    turned = torch.where(labels[:, None] == 0, points, -points)  # class 1, rotated back by pi
    radius = turned.norm(dim=1)
    angle = torch.atan2(turned[:, 0], turned[:, 1]) % (2 * torch.pi)
    off = (radius - angle / (2 * torch.pi)).abs()
    assert torch.minimum(off, 1 - off).max() < 1e-5
    assert radius.max() < 1


def test_spirals_are_private_and_reproducible() -> None:
    before = torch.get_rng_state()
    assert torch.equal(spiral(10, seed=3)[0], spiral(10, seed=3)[0])
    assert not torch.equal(spiral(10, seed=3)[0], spiral(10, seed=4)[0])
    assert torch.equal(torch.get_rng_state(), before)
    radius = spiral()[0].norm(dim=1)
    assert len(radius) == 16_384
    assert radius.mean().item() == pytest.approx(0.5, abs=0.01)  # uniform


@given(st.integers(2, 60), st.floats(0.1, 5))
def test_the_grid_is_an_upright_image(size: int, limit: float) -> None:
    x, y = grid(size, limit=limit).reshape(size, size, 2).unbind(dim=2)
    assert (x[:, 1:] > x[:, :-1]).all()
    assert (y[1:] < y[:-1]).all()
    assert x.abs().max().item() == pytest.approx(limit)
    assert y[0, 0].item() == pytest.approx(limit)


def test_empty_spirals_and_grids_are_refused() -> None:
    with pytest.raises(rdp.ArgumentError, match="at least 1 sample; got samples=0"):
        spiral(0)
    with pytest.raises(rdp.ArgumentError, match=r"grid is empty.*size=1"):
        grid(1)
    with pytest.raises(rdp.ArgumentError, match=r"grid is empty.*limit=-1"):
        grid(50, limit=-1)


def test_analysis_does_not_draw() -> None:
    code = "import sys, rdp.analysis; print([m for m in ('matplotlib', 'PIL', 'tensorboard') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys, rdp; print([m for m in sys.modules if m.startswith(('rdp.analysis', 'rdp.tensorboard'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
