"""Stochastic depth that a model brings along is known by what it does, whatever its classes and settings are called."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import rdp
from models.test_undisturbed import everything, generators, same

WIDTH, ROWS = 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.norm(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    """Three blocks, one after the other."""

    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SkippingList(nn.ModuleList):
    """fairseq's LayerDropModuleList under a name that says nothing."""

    def __init__(self, chance: float, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.chance = chance

    def __iter__(self) -> Any:
        dropped = torch.empty(len(self)).uniform_()
        for i, layer in enumerate(super().__iter__()):
            if not self.training or dropped[i] > self.chance:
                yield layer


class Skips(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = SkippingList(0.4, list(self.layers))


class FromConfig(Net):
    """The encoder's loop reads the configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        rate = self.config["rates"]["fade"] if isinstance(self.config, dict) else self.config.fade
        for layer in self.layers:
            if not (self.training and float(torch.rand(1, device=x.device)) < rate):
                x = layer(x)
        return x


@dataclass(frozen=True)
class FrozenConfig:
    eps: float = 1e-5
    fade: float = 0.4


class PerLayer(Net):
    """x-transformers: one rate for each layer in a tuple, Python's generator, a sum in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_dropouts = (0.0, 0.3, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, rate in zip(self.layers, self.layer_dropouts, strict=True):
            if self.training and rate > 0 and random.random() < rate:
                continue
            x = x + layer.branch(x)
        return x


class WithNumpy(Net):
    """With the probability to survive."""

    survival_prob = 0.6

    def __init__(self) -> None:
        super().__init__()
        self.p_keep = 0.6

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or np.random.uniform() <= self.p_keep:
                x = layer(x)
        return x


class Inline(Block):
    """Stochastic depth in a line: one random number a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stochastic_depth_prob = 0.4

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.training:
            keep = 1 - self.stochastic_depth_prob
            y = y * x.new_empty((len(x), 1)).bernoulli_(keep) / keep
        return x + y


class Where(Block):
    """Per row, after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.4

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(len(x), device=x.device) >= (self.rate if self.training else 0.0)
        return torch.where(keep[:, None], super().forward(x), x)


class Residue(nn.Module):
    """torchvision's StochasticDepth in batch mode, with another name."""

    def __init__(self) -> None:
        super().__init__()
        self.q = 0.4

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.q == 0:
            return x
        noise = torch.empty([1] * x.dim(), dtype=x.dtype, device=x.device).bernoulli_(1 - self.q)
        return x * noise.div_(1 - self.q)


class WithModule(Block):
    def __init__(self) -> None:
        super().__init__()
        self.residue = Residue()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residue(self.branch(x))


class OnRows(nn.Module):
    """torchtune's LayerDropout: runs the function on the rows that are kept, with a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.4
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return function(x)
        skip = torch.bernoulli(torch.full((len(x),), self.share), generator=self.generator)
        kept = (skip == 0).nonzero().squeeze(-1)
        out = x.clone()
        if kept.numel():
            out[kept] = function(torch.index_select(x, 0, kept))
        return out


class Shaped(Block):
    """Dropout of one number a row, as with the noise_shape of Keras."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) * self.rows(x.new_ones(len(x), 1))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.dropout = Block(), OnRows()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.block, x)


DROPPING = {
    "a list that skips": (Skips, "layers.chance = 0.4"),
    "an object as configuration": (lambda: FromConfig(SimpleNamespace(dropout=0.1, fade=0.4)), "config.fade = 0.4"),
    "a frozen configuration": (lambda: FromConfig(FrozenConfig()), "config.fade = 0.4"),
    "a dict as configuration": (lambda: FromConfig({"lr": 0.1, "rates": {"fade": 0.4}}), "config.rates.fade = 0.4"),
    "a rate for each layer": (PerLayer, "PerLayer.layer_dropouts = (0.0, 0.3, 0.5)"),
    "a probability to survive, numpy": (WithNumpy, "WithNumpy.p_keep = 0.6"),
    "in a line": (lambda: Net(Inline), "layers.0.stochastic_depth_prob = 0.4, layers.1.stochastic_depth_prob = 0.4"),
    "after the sum": (lambda: Net(Where), "layers.0.rate = 0.4"),
    "by a module": (lambda: Net(WithModule), "layers.0.residue.q = 0.4"),
    "dropout of rows": (lambda: Net(Shaped), "layers.0.rows.p = 0.4"),
    "on rows, with a generator": (lambda: Net(Wrapped), "layers.0.dropout.share = 0.4"),
}
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip


def speech(family: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**SPEECH | changes)
    return getattr(transformers, f"{family}Model")(config)


def features() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, WIDTH)


def different_outputs(model: nn.Module, x: Tensor) -> int:
    outputs = [model.train()(x) for _ in range(12)]
    return len({float((y if isinstance(y, Tensor) else y[0]).detach().double().sum()) for y in outputs})


@pytest.mark.parametrize(("make", "setting"), DROPPING.values(), ids=DROPPING)
def test_it_is_refused_by_the_name_of_its_setting(make: Callable[[], nn.Module], setting: str) -> None:
    model, x = make().train(), features()
    before, drawn = everything(model), generators()
    with pytest.raises(rdp.NativeDropPathError) as error:
        rdp.attach(model, 0.3, example_inputs=x)
    assert f": {setting}" in str(error.value)
    assert "native='off'" in str(error.value)
    after = everything(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert generators() == drawn


@pytest.mark.parametrize(("make", "setting"), DROPPING.values(), ids=DROPPING)
def test_it_is_silent_until_remove(make: Callable[[], nn.Module], setting: str) -> None:
    model, x = make().train(), features()
    twin = copy.deepcopy(model)
    assert different_outputs(twin, x) > 1
    handle = rdp.attach(model, 0.0, native="off", example_inputs=x)
    assert different_outputs(model, x) == 1
    torch.testing.assert_close(model.train()(x), twin.eval()(x))
    assert len(handle.branches) == 3
    handle.remove()
    assert different_outputs(model, x) > 1


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM"])
def test_speech_models_that_read_their_configuration(family: str) -> None:
    torch.manual_seed(0)
    model, waves = speech(family), torch.randn(2, 400)
    with pytest.raises(rdp.NativeDropPathError, match=r"config.layerdrop = 0.5, which leaves out `encoder.layers"):
        rdp.attach(model, 0.3, example_inputs=waves)
    with rdp.attach(model, 0.0, native="off", example_inputs=waves):
        assert different_outputs(model, waves) == 1
    assert model.config.layerdrop == 0.5
    rdp.attach(speech(family, layerdrop=0.0), 0.3, example_inputs=waves)


def test_in_training_it_is_found_in_the_first_forward() -> None:
    model = Skips().train()
    rdp.attach(model, 0.3)
    with pytest.raises(rdp.NativeDropPathError, match=r"layers.chance = 0.4, which leaves out `layers.0.fc2`"):
        model(features())


class Stubborn(Net):
    """Nothing can be set."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = layer(x)
        return x


@pytest.mark.parametrize("native", ["error", "off"])
def test_what_cannot_be_silenced_is_refused_by_what_it_does(native: Any) -> None:
    with pytest.raises(rdp.NativeDropPathError) as error:
        rdp.attach(Stubborn(), 0.3, native=native, example_inputs=features())
    assert "leaves out `layers.0.fc2`, `layers.1.fc2`, `layers.2.fc2` in training by chance" in str(error.value)


# -- no false alarms --------------------------------------------------------------------------------------------------


class Dropout(Block):
    def branch(self, x: Tensor) -> Tensor:
        return functional.dropout(super().branch(functional.dropout1d(x, 0.2, self.training)), 0.5, self.training)


class Noise(Block):
    """Of every shape, and a random scale for each row, which is never zero."""

    def branch(self, x: Tensor) -> Tensor:
        scale = torch.rand(len(x), 1, device=x.device) + 0.5
        return super().branch(x + torch.randn_like(x) + random.random() + np.random.randn()) * scale


class Inputs(Net):
    """Whole inputs are dropped, as for classifier-free guidance, and some tokens masked; no branch is."""

    def __init__(self) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(WIDTH))
        self.condition = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        condition = torch.where(torch.rand(len(x), 1, device=x.device) < 0.1, self.null, self.condition(x))
        mask = torch.rand(x.shape, device=x.device) < 0.5
        return super().forward(x.masked_fill(mask, 0.0) * (torch.rand(len(x), 1, device=x.device) > 0.1)) + condition


class Experts(Block):
    """Another expert takes the place of the one that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def branch(self, x: Tensor) -> Tensor:
        return self.experts[random.randrange(4) if self.training else 0](self.norm(x))


class RoutedByNoise(Block):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)

    def branch(self, x: Tensor) -> Tensor:
        logits = self.router(x) + torch.rand(len(x), 2, device=x.device)
        weights = functional.gumbel_softmax(logits, hard=True) if self.training else logits.softmax(-1)
        return self.fc1(x) * weights[:, :1] + self.fc2(x) * weights[:, 1:]


class SelfConditioned(Net):
    """In half of the steps, a diffusion model is given its own estimate."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            with torch.no_grad():
                x = x + super().forward(x)
        return super().forward(x)


class SelfConditionedByRow(Net):
    """The same for half of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            estimate = super().forward(x)
        return super().forward(x + estimate * (torch.rand(len(x), 1, device=x.device) < 0.5))


class SelfConditionedInside(Net):
    """The same, with the estimate of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.estimate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand(()) < 0.5:
            with torch.no_grad():
                x = x + self.estimate(x)
        return super().forward(x)


class Unread(Net):
    """A configuration that says it, and nobody who reads it; and a branch that does at a rate of 0."""

    def __init__(self) -> None:
        super().__init__(Inline)
        self.config = SimpleNamespace(layerdrop=0.1, encoder_layerdrop=0.1)
        self.drop_path_rate = 0.1
        for layer in self.layers:
            layer.stochastic_depth_prob = 0.0


def with_rate_zero() -> nn.Module:
    model = PerLayer()
    model.layer_dropouts = (0.0, 0.0, 0.0)
    return model


QUIET = {
    "dropout": lambda: Net(Dropout),
    "noise": lambda: Net(Noise),
    "dropped inputs": Inputs,
    "a choice of experts": lambda: Net(Experts),
    "routing by noise": lambda: Net(RoutedByNoise),
    "its own estimate": SelfConditioned,
    "its own estimate for some rows": SelfConditionedByRow,
    "an estimate": SelfConditionedInside,
    "settings that nobody reads": Unread,
    "rates of 0": with_rate_zero,
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
}


@pytest.mark.parametrize("make", QUIET.values(), ids=QUIET)
def test_what_only_draws_random_numbers_drops_no_paths(make: Callable[[], nn.Module]) -> None:
    x = features() if make is not QUIET["transformer"] else torch.randn(ROWS, 5, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without the proof: of experts that are drawn it sees those of one draw, and refuses what others make unsound.
        assert rdp.attach(make().train(), 0.3, example_inputs=x, verify=False).branches


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM"])
def test_masking_in_time_is_no_dropping_of_paths(family: str) -> None:
    model = speech(family, layerdrop=0.0, apply_spec_augment=True, mask_time_prob=0.3, mask_time_length=2)
    assert rdp.attach(model.train(), 0.3, example_inputs=torch.randn(2, 800)).branches


def test_masked_autoencoders_draw_and_are_not_refused() -> None:
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        handle = rdp.attach(transformers.ViTMAEModel(config).train(), 0.3, example_inputs=torch.randn(2, 3, 16, 16))
    assert len(handle.branches) == 4
