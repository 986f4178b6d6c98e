"""`rdp.native`: which modules drop paths by themselves, and silencing them."""

from __future__ import annotations

import pytest
import timm.layers
from torch import nn
from torchvision.ops import StochasticDepth

from rdp.native import NativeDrop, find_native_drops, settings_around


class Holder(nn.Module):
    """A module with the given attributes; named by `kind`, where its class matters."""

    def __new__(cls, kind: str = "Block", **attributes: object) -> Holder:
        return super().__new__(type(kind, (Holder,), {}))

    def __init__(self, kind: str = "Block", **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        (timm.layers.DropPath(0.25), "drop_prob"),
        (StochasticDepth(0.25, "row"), "p"),
        (Holder("SwinDropPath", drop_prob=0.25), "drop_prob"),
        (Holder("MyDropPathV2", drop_path_prob=0.25), "drop_path_prob"),
        (Holder("droppath", drop_path_rate=0.25), "drop_path_rate"),
        (Holder("BatchStochasticDepth", p=0.25), "p"),
        (Holder("DropPath", drop_prob=0.0, p=0.25), "p"),
        (Holder("Encoder", layerdrop=0.25), "layerdrop"),
        (Holder("LayerDropout", prob=0.25), "prob"),
        (Holder("LayerDropModuleList", p=0.25), "p"),
        (Holder("Block", sample_drop_ratio=0.25), "sample_drop_ratio"),
        (Holder("Encoder", drop_path_prob=0.25), "drop_path_prob"),
    ],
)
def test_what_drops_paths_is_found_silenced_and_restored(module, attribute):
    model = nn.ModuleDict({"block": module})
    (drop,) = find_native_drops(model)
    assert drop == NativeDrop("block", module, attribute, 0.25)
    assert str(drop) == f"block.{attribute} = 0.25"
    drop.silence()
    assert getattr(module, attribute) == 0.0
    assert find_native_drops(model) == []
    drop.restore()
    assert getattr(module, attribute) == 0.25


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.5),
        timm.layers.DropPath(0.0),
        timm.layers.DropPath(None),
        Holder("DropPath"),
        Holder("DropPath", drop_prob="a half"),
        Holder("DropPath", layerdrop=0.5),
        Holder("Encoder", drop_path_rate=0.5),
        Holder("Encoder", layerdrop=0.0),
        Holder("Encoder", drop_path_prob=None),
    ],
)
def test_what_does_not_drop_paths_is_left_alone(module):
    assert find_native_drops(nn.Sequential(module)) == []


def test_the_model_itself_goes_by_its_class():
    (drop,) = find_native_drops(Holder("Encoder", layerdrop=1))
    assert str(drop) == "Encoder.layerdrop = 1"
    assert type(drop.probability) is float


def test_each_module_is_found_once_and_in_order():
    paths = [timm.layers.DropPath(rate) for rate in (0.1, 0.0, 0.3)]
    encoder = Holder("StochasticDepth", drop_prob=0.2, drop_path_prob=0.4)
    found = find_native_drops(nn.Sequential(*paths, encoder))
    assert [str(drop) for drop in found] == ["0.drop_prob = 0.1", "2.drop_prob = 0.3", "3.drop_prob = 0.2"]


def test_settings_are_found_in_modules_around_and_in_their_configurations():
    config = {"eps": 1e-5, "layers": 4, "skip": {"rate": 0.5}, "label": "a", "on": True}
    inner = Holder(p=0.25, keep_prob=0.75, rates=(0.0, 0.5), sizes=(1.0, 2.0), none=(0.0, 0.0), config=config)
    model = nn.ModuleDict({"block": nn.Sequential(inner), "other": Holder(p=0.5)})
    groups = settings_around(model, ["block.0"])
    names = [str(group[0]) for group in groups if group[0].off in (0.0, (0.0, 0.0))]
    assert sorted(names) == [
        "block.0.config.eps = 1e-05",
        "block.0.config.skip.rate = 0.5",
        "block.0.keep_prob = 0.75",
        "block.0.p = 0.25",
        "block.0.rates = (0.0, 0.5)",
    ]
    rates = next(group[0] for group in groups if group[0].attribute == "rates")
    rates.silence()
    assert inner.rates == (0.0, 0.0)
    rates.restore()
    assert inner.rates == (0.0, 0.5)


def test_settings_that_speak_for_themselves_come_first_and_those_of_several_layers_together():
    layers = [Holder(a=0.5, layer_dropout=0.5 + i / 10) for i in range(2)]
    for layer in layers:
        layer.__class__ = type(layers[0])
    groups = settings_around(nn.Sequential(*layers), ["0", "1"])
    assert [str(setting) for setting in groups[0]] == ["0.layer_dropout = 0.5", "1.layer_dropout = 0.6"]
    assert [group[0].off for group in groups] == [0.0, 0.0, 1.0, 1.0]
