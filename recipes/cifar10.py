"""CIFAR-10: 32x32 in colour, padded by 4, cropped at random and flipped.

    python recipes/cifar10.py --download                             # ResNet-50, RDP, five seeds
    python recipes/cifar10.py --download --algorithm droppath --model resnet50d
    python recipes/cifar10.py --download --small-stem                # the custom stem for 32x32, not the paper's
    python recipes/cifar10.py --help

Results go to results/DATASET/MODEL/ALGORITHM/seed-N; tools/table1.py makes the table of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine import Config, World, main, make_model, open_loaders, parse, train


@dataclass(frozen=True)
class Cifar10Config(Config):
    """Train on CIFAR-10. Defaults: Park 2024, section 4, and timm where the paper is silent."""

    dataset: Literal["cifar10"] = "cifar10"
    """The only one here."""


def configure(args: list[str]) -> Cifar10Config:
    """Read the command line."""
    return parse(Cifar10Config, args)


def run(config: Cifar10Config, seed: int, world: World) -> None:
    """Train one seed."""
    with open_loaders(config, seed, world) as (train_data, test_data):
        model = make_model(config, classes=train_data.classes, channels=train_data.channels)
        train(model, train_data, test_data, config=config, seed=seed, world=world)


if __name__ == "__main__":
    main(configure, run)
