"""Parts of a training model that do not train: in eval mode, or under `torch.no_grad`. They are the plain network.

The flag that matters is that of the module that adds. An oracle is written out for each model: `plain` parts computed
by hand, gated ones with the masks of the handle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rdp

ROWS = 6


class Block(nn.Module):
    """x + f(x), with a batch normalisation at the end of f if asked for."""

    def __init__(self, size: int = 5, norm: bool = False) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))
        self.end: nn.Module = nn.BatchNorm1d(size) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.f(x))


class Parts(nn.Module):
    """Two stages and a head; `how` the first stage runs."""

    def __init__(self, how: str = "plainly", norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.first = nn.Sequential(Block(norm=norm), Block(norm=norm))
        self.second = nn.Sequential(Block(norm=norm), Block(norm=norm))
        self.head = nn.Linear(5, 2)
        self.how = how
        self.features: Tensor | None = None

    def stage(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.first(x)
        if self.how == "set_grad_enabled":
            with torch.set_grad_enabled(False):
                return self.first(x)
        if self.how == "in training only":
            with torch.set_grad_enabled(not self.training):
                return self.first(x)
        if self.how == "decorated":
            return torch.no_grad()(self.first)(x)
        if self.how == "inference_mode":
            with torch.inference_mode():
                made = self.first(x)
            return made.clone()
        if self.how == "reentrant":
            return checkpoint(self.first, x, use_reentrant=True)
        if self.how == "no_grad in reentrant":

            def run(x: Tensor) -> Tensor:
                with torch.no_grad():
                    made = self.first(x)
                return made + 0 * x

            return checkpoint(run, x, use_reentrant=True)
        if self.how == "reentrant in no_grad":
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that no input needs gradients
                return checkpoint(self.first, x, use_reentrant=True)
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.stem(x))
        self.features = x.detach().clone()
        return self.head(self.second(x))


def seeded(how: str = "plainly", norm: bool = False) -> Parts:
    """A `Parts` with random parameters and statistics, always the same."""
    torch.manual_seed(3)
    model = Parts(how, norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
    return model


def first_stage(model: Parts, x: Tensor) -> Tensor:
    """What the first stage gives without any masks."""
    with torch.no_grad():
        x = model.stem(x)
        for block in model.first:
            x = x + block.end(block.f(x))
    return x


def is_plain(model: Parts, x: Tensor) -> bool:
    """Did the latest forward give the features of the plain network?"""
    return torch.equal(model.features, first_stage(model, x))  # type: ignore[arg-type]


def steps(model: Parts, handle: rdp.ResidualDropPath, number: int) -> Iterator[Tensor]:
    """Train for some steps; the batch of each, after its forward."""
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1))
    for _ in range(number):
        x = torch.randn(ROWS, 3)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        yield x
        loss.backward()
        optimizer.step()


NOT_TRAINED = [
    "no_grad",
    "set_grad_enabled",
    "in training only",
    "decorated",
    "inference_mode",
    "no_grad in reentrant",
    "reentrant in no_grad",
]
MODES = pytest.mark.parametrize("mode", ["row", "batch"])


@MODES
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("how", NOT_TRAINED)
def test_a_part_without_gradients_is_plain_and_takes_no_part_in_the_rates(how: str, mode: str, lazy: bool) -> None:
    model = seeded(how)
    handle = rdp.attach(model, 0.8, mode=mode, example_inputs=None if lazy else torch.randn(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        for x in steps(model, handle, 6):
            assert is_plain(model, x)
    assert [(b.rate, b.idle) for b in handle.branches] == [
        (0.0, "without gradients"),
        (0.0, "without gradients"),
        (0.0, ""),
        (0.8, ""),
    ]
    assert handle.check().ok
    assert "not gated: without gradients" in str(handle)


@MODES
def test_a_part_in_eval_mode_when_found_is_plain_and_takes_no_part_in_the_rates(mode: str) -> None:
    model = seeded(norm=True)
    model.first.eval()
    handle = rdp.attach(model, 0.8, mode=mode)
    for x in steps(model, handle, 6):
        assert is_plain(model, x)
    assert [b.rate for b in handle.branches] == [0.0, 0.0, 0.0, 0.8]
    assert "not gated: in eval mode" in str(handle)


@MODES
@pytest.mark.parametrize("compute", ["dense", "rows"])
def test_a_part_in_eval_mode_later_is_plain_and_learns_in_every_step(mode: str, compute: str) -> None:
    model = seeded()
    handle = rdp.attach(model, 0.8, mode=mode, compute=compute, decay="constant", example_inputs=torch.randn(2, 3))
    model.first.eval()
    for x in steps(model, handle, 8):
        assert is_plain(model, x)
        assert not any(name.startswith("first") for name in handle.frozen)
        assert handle.masks[:2].all()
    model.train()
    different = 0
    for x in steps(model, handle, 8):
        different += not is_plain(model, x)
    assert different > 0


@MODES
@pytest.mark.parametrize("evaluated", ["norms", "branches"])
def test_the_flag_of_the_module_that_adds_decides(mode: str, evaluated: str) -> None:
    """Frozen statistics, or a branch in eval mode in a block that trains, are no reason to stop."""
    model = seeded(norm=True)
    handle = rdp.attach(model, 0.8, mode=mode, decay="constant", compute="dense")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) or (evaluated == "branches" and isinstance(module, nn.Sequential)):
            module.eval()
    for block in (*model.first, *model.second):
        block.train()
        block.end.eval()
    different = 0
    for x in steps(model, handle, 8):
        if handle.phase is rdp.Phase.DROP:
            mask = handle.masks
            with torch.no_grad():
                y = model.stem(x)
                for block, keep in zip(model.first, mask, strict=False):
                    y = y + keep[:, None] * block.end(block.f(y))
            torch.testing.assert_close(model.features, y)
            different += not mask[:2].all()
    assert different > 0


@MODES
def test_a_reentrant_checkpoint_is_gated_as_without_it(mode: str) -> None:
    results = []
    for how in ("plainly", "reentrant"):
        model = seeded(how)
        handle = rdp.attach(model, 0.6, mode=mode, decay="constant", example_inputs=torch.randn(2, 3))
        torch.manual_seed(0)
        seen = [model.features for _ in steps(model, handle, 8)]
        results.append((seen, [p.detach().clone() for p in model.parameters()]))
        assert not any(b.idle for b in handle.branches)
    for plainly, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plainly, checkpointed)


def test_a_part_that_begins_to_train_is_named_and_stays_plain() -> None:
    model = seeded()
    model.first.eval()
    handle = rdp.attach(model, 0.8)
    list(steps(model, handle, 2))
    model.train()
    with pytest.warns(rdp.RdpWarning, match=r"branch `first\.0\.end` trains now, but was in eval mode"):
        plain = [is_plain(model, x) for x in steps(model, handle, 2)]
    assert all(plain)
    assert "`first.0.end`, `first.1.end`" in "".join(handle.check().problems)
    handle.remove()
    handle = rdp.attach(model, 0.8, example_inputs=torch.randn(2, 3))
    assert [b.rate for b in handle.branches] == pytest.approx([0.0, 0.8 / 3, 1.6 / 3, 0.8])


def test_a_model_of_which_nothing_trains_is_told() -> None:
    model = seeded()
    model.first.eval()
    model.second.eval()
    with pytest.warns(rdp.RdpWarning, match="all 4 residual branches .* in eval mode"):
        rdp.attach(model, 0.8, example_inputs=torch.randn(2, 3))


def test_a_model_in_eval_mode_does_not_say_what_will_train() -> None:
    model = seeded().eval()
    handle = rdp.attach(model, 0.8, decay="constant", example_inputs=torch.randn(2, 3))
    assert [b.rate for b in handle.branches] == [0.8] * 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_part_in_eval_mode_is_plain_in_a_compiled_model(backend: str) -> None:
    torch._dynamo.reset()
    model = seeded()
    handle = rdp.attach(model, 0.8, decay="constant", example_inputs=torch.randn(2, 3))
    compiled = torch.compile(model, backend=backend)
    for evaluated in (True, False, True):
        model.train()
        model.first.train(not evaluated)
        plain = []
        for _ in range(4):
            x = torch.randn(ROWS, 3)
            compiled(x).sum().backward()
            handle.advance()
            model.zero_grad()
            plain.append(torch.allclose(model.features, first_stage(model, x)))  # type: ignore[arg-type]
        assert all(plain) if evaluated else not all(plain)
    torch._dynamo.reset()
