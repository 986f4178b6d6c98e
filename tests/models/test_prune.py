"""Pruned models of timm, torchvision and transformers: smaller and cheaper by just what was taken out, and ordinary."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rdp

Inputs = dict[str, Tensor]


class Model(NamedTuple):
    """A model, and which modules of a branch do the work, by a part of the branch's name."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    work: dict[str, list[str]]


def images(side: int, name: str = "x") -> Callable[[int], Inputs]:
    return lambda rows: {name: torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(rows))}


def tokens(rows: int) -> Inputs:
    return {"input_ids": torch.randint(0, 40, (rows, 5), generator=torch.Generator().manual_seed(rows))}


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=40, **size))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, use_cache=False))


def swin() -> nn.Module:
    size = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "img_size": 32}
    return timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0, num_classes=3, **size)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
MODELS = {
    "timm/vit": Model(
        lambda: timm.models.VisionTransformer(**VIT, init_values=0.1),
        images(32),
        {"drop_path1": ["norm1", "attn", "ls1"], "drop_path2": ["norm2", "mlp", "ls2"]},
    ),
    "timm/convnext": Model(
        lambda: timm.create_model("test_convnext", num_classes=3), images(64), {"drop_path": ["conv_dw", "norm", "mlp"]}
    ),
    "timm/swin": Model(swin, images(32), {"drop_path1": ["norm1", "attn"], "drop_path2": ["norm2", "mlp"]}),
    "timm/resnet": Model(
        lambda: timm.create_model("test_resnet", num_classes=3), images(32), {"bn2": ["conv1", "bn1", "conv2", "bn2"]}
    ),
    "torchvision/resnet": Model(
        lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], width_per_group=4),
        images(32),
        {"bn3": ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"]},
    ),
    "torchvision/vit": Model(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32), images(32), {"mlp": ["ln_2", "mlp"]}
    ),
    "transformers/bert": Model(
        bert,
        tokens,
        {
            "attention.output.dropout": ["attention.self", "attention.output.dense"],
            "dropout": ["intermediate", "dense"],
        },
    ),
    "transformers/gpt2": Model(
        gpt2, tokens, {"attn.resid_dropout": ["ln_1", "attn"], "mlp.dropout": ["ln_2", "mlp"], "mlp": ["ln_2", "mlp"]}
    ),
}
EVERY = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def attached(model: Model) -> tuple[nn.Module, rdp.ResidualDropPath]:
    torch.manual_seed(0)
    net = model.build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm's last ones begin with zeros
    return net, rdp.attach(net, 0.2, example_inputs=model.inputs(2), verify=False)


def run(net: nn.Module, inputs: Inputs) -> Tensor:
    output: Any = net(**inputs)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def flops(net: nn.Module, inputs: Inputs) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**inputs)
    return counter


@EVERY
def test_flops_and_parameters_fall_by_what_was_taken_out(model):
    net, handle = attached(model)
    gone = [branch for branch in handle.branches if any(branch.name.endswith(end) for end in model.work)][::2]
    pruned = rdp.prune(handle, keep=[branch.name for branch in handle.branches if branch not in gone])
    inputs = model.inputs(3)
    # In eval mode torch's own attention is one operator, whose operations are not counted.
    counted, left = flops(net.eval(), inputs), flops(pruned.eval(), inputs)
    by_module = {name.partition(".")[2]: sum(ops.values()) for name, ops in counted.get_flop_counts().items()}
    expected = 0
    for branch in gone:
        end = next(end for end in model.work if branch.name.endswith(end))
        around = branch.name.removesuffix(end)
        expected += sum(by_module.get(around + module, 0) for module in model.work[end])
    assert expected > 0
    assert left.get_total_flops() == counted.get_total_flops() - expected
    names = {name for branch in gone for name in branch.parameters}
    assert {name for name, _ in pruned.named_parameters()} == {name for name, _ in net.named_parameters()} - names
    with handle.without([branch.name for branch in gone]), torch.no_grad():
        torch.testing.assert_close(run(pruned, inputs), run(net, inputs))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=name, marks=[] if name in ("timm/vit", "torchvision/resnet") else pytest.mark.slow)
        for name, model in MODELS.items()
    ],
)
def test_a_pruned_model_is_an_ordinary_one(model):
    _, handle = attached(model)
    keep = [branch.name for branch in handle.branches[1::2]]
    pruned, inputs = rdp.prune(handle, keep=keep), model.inputs(3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pruned.modules())
    assert pruned.training
    run(pruned, inputs).sum().backward()
    pruned.eval()
    with torch.no_grad():
        expected = run(pruned, inputs)
    other = rdp.prune(handle, keep=keep)
    nn.init.constant_(next(other.parameters()), 0.0)
    other.load_state_dict(pruned.state_dict())
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    exported = torch.export.export(pruned, (), inputs).module()
    torch._dynamo.reset()
    compiled = torch.compile(pruned, backend="eager")
    with torch.no_grad():
        for same in (other.eval(), loaded, exported, compiled):
            torch.testing.assert_close(run(same, inputs), expected)
    again = rdp.attach(pruned.train(), 0.2, example_inputs=model.inputs(2), verify=False)
    assert [branch.name for branch in again.branches] == keep


@pytest.mark.parametrize("side", [32, 40, 45])
@pytest.mark.parametrize("name", ["timm/resnet", "torchvision/resnet", "timm/convnext"])
def test_images_of_other_sizes_fit_too(name, side):
    net, handle = attached(MODELS[name])
    gone = [branch.name for branch in handle.branches]
    pruned, x = rdp.prune(handle, keep=()), torch.randn(1, 3, side, side)
    with handle.without(gone), torch.no_grad():
        torch.testing.assert_close(pruned.eval()(x), net.eval()(x))
