"""Frozen parts of real models: in eval mode or under `no_grad` they are plain while the rest is trained with masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import rdp

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(4, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def vit() -> tuple[nn.Module, str, Tensor]:
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=3)
    return model, "blocks.1", IMAGES


def resnet() -> tuple[nn.Module, str, Tensor]:
    return torchvision.models.resnet18(num_classes=3), "layer2", IMAGES


def bert() -> tuple[nn.Module, str, Tensor]:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config), "encoder.layer.1", TOKENS


MODELS = pytest.mark.parametrize("build", [vit, resnet, bert])
MODES = pytest.mark.parametrize("mode", ["row", "batch"])


def under_no_grad(module: nn.Module) -> None:
    """Let a module run without gradients, as the code of a frozen backbone has it."""
    module.forward = torch.no_grad()(module.forward)  # type: ignore[method-assign]


def outputs(result: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return result if isinstance(result, Tensor) else result[0]


def different_steps(model: nn.Module, part: nn.Module, handle: rdp.ResidualDropPath, x: Tensor) -> int:
    """In how many of 6 training steps the part gave something else than the plain part does."""
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    calls: list[Any] = []
    hook = part.register_forward_hook(
        lambda _, args, kwargs, made: calls.append((args, kwargs, made)), with_kwargs=True
    )
    different = 0
    for _ in range(6):
        optimizer.zero_grad()
        made = outputs(model(x))
        args, kwargs, gated = calls.pop()
        with handle.paused(), torch.no_grad():
            plain = outputs(part(*args, **kwargs))
        calls.clear()
        different += not torch.equal(outputs(gated), plain)
        made.square().mean().backward()
        optimizer.step()
    hook.remove()
    return different


@MODELS
@MODES
@pytest.mark.parametrize("compute", ["dense", "auto"])
def test_a_part_in_eval_mode_is_plain(build: Callable[[], Any], mode: str, compute: str) -> None:
    torch.manual_seed(0)
    model, name, x = build()
    model.train()
    part = model.get_submodule(name)
    handle = rdp.attach(model, 0.8, decay="constant", mode=mode, compute=compute, example_inputs=x)
    part.eval()
    assert different_steps(model, part, handle, x) == 0
    assert not any(name.startswith(f"{name}.") for name in handle.frozen)
    part.train()
    for module in part.modules():
        module.train(not isinstance(module, nn.BatchNorm2d))  # as in fine-tuning with frozen statistics
    assert different_steps(model, part, handle, x) > 0


@MODELS
@MODES
def test_a_part_that_does_not_train_when_found_has_no_rate(build: Callable[[], Any], mode: str) -> None:
    for how in ("eval", "no_grad"):
        torch.manual_seed(0)
        model, name, x = build()
        model.train()
        part = model.get_submodule(name)
        part.eval() if how == "eval" else under_no_grad(part)
        handle = rdp.attach(model, 0.8, mode=mode)
        assert different_steps(model, part, handle, x) == 0
        inside = [b.rate for b in handle.branches if b.idle]
        others = [b.rate for b in handle.branches if not b.idle]
        assert len(inside) == sum(b.name.startswith(name) for b in handle.branches)
        assert set(inside) == {0.0}
        assert others == sorted(others)
        assert others[0] == 0.0
        assert others[-1] == pytest.approx(0.8)
        steps = sorted(set(others))
        assert steps == pytest.approx([0.8 * i / (len(steps) - 1) for i in range(len(steps))])
        assert handle.check().ok
