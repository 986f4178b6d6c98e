"""ImageNet at 224 pixels, batch 1024, read by FFCV; one process for each visible GPU.

    python recipes/imagenet_ffcv.py --data-dir DATA                  # ResNet-50, RDP, all GPUs, one seed
    python recipes/imagenet_ffcv.py --data-dir DATA --preset ffcv-16ep --algorithm standard
    torchrun --nnodes 2 --nproc-per-node 4 ... recipes/imagenet_ffcv.py --data-dir DATA
    python recipes/imagenet_ffcv.py --help

DATA holds the class folders `train/CLASS/*` and `val/CLASS/*`, or the `.beton` files that tools/write_beton.py makes of
them. The presets are those of ffcv-imagenet (libffcv, rn50_configs), whose published top-1 of plain ResNet-50 on eight
A100 is 73.8 % after 16 epochs (14.9 minutes), 77.2 % after 40 and 78.4 % after 88.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from engine import Config, Range, command_line, interruptible, parse

Preset = Literal["paper", "ffcv-16ep", "ffcv-24ep", "ffcv-32ep", "ffcv-40ep", "ffcv-56ep", "ffcv-88ep"]
PIXELS = Range(1, most=4096)


@dataclass(frozen=True)
class ImagenetConfig(Config):
    """Train on ImageNet, or any folder of class folders. Defaults: Park 2024, section 4, then timm."""

    preset: Preset = "paper"
    """paper: 224 pixels throughout. ffcv-Nep: N epochs of ffcv-imagenet, with growing images, BlurPool, fp16 and its
    learning rate. Options given besides it still count."""
    dataset: Literal["imagenet"] = "imagenet"
    """The only one here; the number of classes is that of the folder."""
    batch_size: Annotated[int, Range(1)] = 1024
    """Images in an optimizer step, over all devices and micro-batches (paper: 1024 over four GPUs)."""
    devices: Annotated[int, Range(0)] = 0
    """How many devices, one process each; 0 takes every visible GPU. Under torchrun, torchrun decides."""
    seeds: Annotated[int, Range(1)] = 1
    """How many runs, with the seeds `seed`, `seed + 1`, ..."""
    resolution: Annotated[int, PIXELS] = 224
    """Height and width of training images in pixels, at the end if they grow."""
    start_resolution: Annotated[int | None, PIXELS] = None
    """Their size in the first epochs; default: the same throughout."""
    grow_from: Annotated[int, Range(0)] = 0
    """The last epoch at start_resolution."""
    grow_until: Annotated[int, Range(0)] = 0
    """The first epoch at resolution; in between it grows in steps of 32 pixels."""
    test_resolution: Annotated[int | None, PIXELS] = None
    """Height and width of test images in pixels; default: that of training images."""
    blurpool: bool = False
    """Blur before every convolution of stride 2 (Zhang 2019), as ffcv-imagenet does."""

    @property
    def usual(self) -> Config:
        """The preset."""
        return PRESETS[self.preset]

    def resolution_at(self, epoch: int) -> int:
        """Height and width of training images in an epoch.

        Source: ffcv-imagenet's `get_resolution`.
        """
        low = self.resolution if self.start_resolution is None else self.start_resolution
        if epoch <= self.grow_from:
            return low
        if epoch >= self.grow_until:
            return self.resolution
        grown = (epoch - self.grow_from) / (self.grow_until - self.grow_from)
        return 32 * round((low + grown * (self.resolution - low)) / 32)


def ffcv(preset: Preset, epochs: int, grow_from: int, grow_until: int) -> ImagenetConfig:
    """A ResNet-50 recipe of ffcv-imagenet; 8 x 512 images a step, the learning rate falls linearly."""
    return ImagenetConfig(
        preset=preset,
        epochs=epochs,
        batch_size=4096,
        lr=1.7,
        weight_decay=1e-4,
        schedule="linear",
        warmup_epochs=2,
        resolution=192,
        start_resolution=160,
        grow_from=grow_from,
        grow_until=grow_until,
        test_resolution=256,
        test_flip=True,
        blurpool=True,
        amp="fp16",
        channels_last=True,
    )


PRESETS: dict[str, ImagenetConfig] = {
    "paper": ImagenetConfig(),
    "ffcv-16ep": ffcv("ffcv-16ep", 16, 11, 13),
    "ffcv-24ep": ffcv("ffcv-24ep", 24, 17, 20),
    "ffcv-32ep": ffcv("ffcv-32ep", 32, 23, 27),
    "ffcv-40ep": ffcv("ffcv-40ep", 40, 29, 34),
    "ffcv-56ep": ffcv("ffcv-56ep", 56, 41, 48),
    "ffcv-88ep": ffcv("ffcv-88ep", 88, 65, 76),
}


def configure(args: list[str]) -> ImagenetConfig:
    """Read the command line: first the preset, then what changes it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="paper")
    preset = first.parse_known_args(args)[0].preset
    return parse(ImagenetConfig, args, default=PRESETS.get(preset))


if __name__ == "__main__":
    config = command_line(configure)  # before the imports below, which take seconds

with interruptible():
    from engine.launch import World
    from engine.loaders import open_loaders
    from engine.main import main
    from engine.model import make_model
    from engine.train import train
    from torch import Tensor, nn
    from torch.nn import functional


class BlurredConv2d(nn.Module):
    """A convolution on a blurred image, so that its stride does not alias."""

    kernel: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        """Wrap a convolution.

        Args:
            conv: of stride 2.
        """
        super().__init__()
        self.conv = conv
        row = conv.weight.new_tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (row[:, None] * row).repeat(conv.in_channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blur `Tensor[N, C, H, W]`, then convolve."""
        return self.conv(functional.conv2d(x, self.kernel, padding=1, groups=self.conv.in_channels))


def blur_strides(model: nn.Module) -> None:
    """Replace every convolution of stride 2 with at least 16 channels, in place.

    Source: ffcv-imagenet's `use_blurpool`; Zhang 2019, "Making convolutional networks shift-invariant again".
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
                setattr(parent, name, BlurredConv2d(child))


def run(config: ImagenetConfig, seed: int, world: World) -> None:
    """Train one seed."""
    sizes: dict[str, Any] = {
        "resolution": config.resolution_at,
        "test_resolution": config.test_resolution or config.resolution,
    }
    with open_loaders(config, seed, world, **sizes) as (train_data, test_data):
        model = make_model(config, classes=train_data.classes, channels=train_data.channels)
        if config.blurpool:
            blur_strides(model)
        train(model, train_data, test_data, config=config, seed=seed, world=world)


if __name__ == "__main__":
    main(config, run)
