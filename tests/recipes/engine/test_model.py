from __future__ import annotations

import pytest
import torch
from engine import Config, RunError
from engine.launch import World
from engine.model import attach, distribute, make_model, make_optimizer
from torch import nn

import rdp


def test_a_model_has_the_channels_and_classes_of_the_data() -> None:
    model = make_model(Config(model="test_resnet"), classes=7, channels=1)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_an_unknown_model_is_refused_with_its_neighbours() -> None:
    with pytest.raises(RunError, match=r"timm has no model 'resnt50': do you mean .*resnet50"):
        make_model(Config(model="resnt50"), classes=10, channels=1)
    with pytest.raises(RunError, match=r"timm has no model '\?': see timm.list_models\(\)"):
        make_model(Config(model="?"), classes=10, channels=1)


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_a_small_stem_keeps_the_resolution(name: str) -> None:
    images = torch.zeros(2, 3, 32, 32)
    sizes = {}
    for small in (False, True):
        model = make_model(Config(model=name, small_stem=small), classes=10, channels=3)
        sizes[small] = model.maxpool(model.act1(model.bn1(model.conv1(images)))).shape[2:]
    assert sizes == {False: (8, 8), True: (32, 32)}


def test_a_small_stem_is_refused_where_there_is_no_resnet_stem() -> None:
    with pytest.raises(RunError, match="--small-stem is for ResNets: test_vit has no conv1 and maxpool"):
        make_model(Config(model="test_vit", small_stem=True), classes=10, channels=3)


@pytest.mark.parametrize(
    ("algorithm", "phases"),
    [("droppath", [rdp.Phase.DROP] * 4), ("rdp", [rdp.Phase.DROP, rdp.Phase.FREEZE] * 2)],
)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_an_algorithm_is_its_phases(algorithm: str, phases: list[rdp.Phase], mode: str) -> None:
    config = Config(model="test_resnet", algorithm=algorithm, mode=mode, rate=0.5)
    model = make_model(config, classes=4, channels=1)
    with attach(model, config, seed=1, example=torch.zeros(2, 1, 28, 28)) as handle:
        seen = []
        for _ in range(4):
            seen.append(handle.phase)
            model(torch.randn(6, 1, 28, 28)).sum().backward()
            handle.advance()
        assert seen == phases
        assert max(branch.rate for branch in handle.branches) == 0.5
        columns = {tuple(column) for column in handle.masks.T.tolist()}
        assert len(columns) == 1 or mode == "row"


def test_droppath_rescales_and_rdp_does_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.branch(x)

    x = torch.randn(64, 3)
    for algorithm, scale in (("droppath", 1 / 0.75), ("rdp", 1.0)):
        model = Net()
        with attach(model, Config(algorithm=algorithm, rate=0.25), seed=0, example=x[:2]) as handle:
            y = model.train()(x)
            kept = handle.masks[0].unsqueeze(1)
        assert 0 < kept.sum() < 64
        torch.testing.assert_close(y, x + kept * model.branch(x) * scale)


def test_standard_attaches_nothing() -> None:
    model = make_model(Config(model="test_resnet"), classes=4, channels=1)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert attach(model, Config(algorithm="standard"), seed=0) is None
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = make_optimizer(model, Config(weight_decay=0.3, lr=0.2, momentum=0.8))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.2, 0.8, True)}


def test_an_unknown_optimizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RunError, match=r"timm has no optimizer 'sgdd': choose one of .*adamw.*sgd"):
        make_optimizer(nn.Linear(1, 1), Config(optimizer="sgdd"))


def test_settings_that_an_optimizer_does_not_take_are_named() -> None:
    with pytest.raises(RunError, match=r"timm's optimizer 'sgd' does not take .*'momentum': 0.0.*: Nesterov momentum"):
        make_optimizer(nn.Linear(1, 1), Config(momentum=0.0))


def test_fsdp_alone_is_refused() -> None:
    with pytest.raises(RunError, match="--fsdp shards over several processes and there is one"):
        distribute(nn.Linear(1, 1), Config(fsdp=True), World(torch.device("cpu")))
