"""MNIST and Fashion-MNIST: grayscale, 28x28, as they are.

    python recipes/mnist.py --quick                                  # 10,000 real digits that come with the recipes
    python recipes/mnist.py --download --algorithm standard          # the full set, five seeds
    python recipes/mnist.py --dataset fashion-mnist --download
    python recipes/mnist.py --help

Results go to results/DATASET/MODEL/ALGORITHM/seed-N; tools/table1.py makes the table of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine import Config, command_line, interruptible, parse


@dataclass(frozen=True)
class MnistConfig(Config):
    """Train on MNIST or Fashion-MNIST. Defaults: Park 2024, section 4, and timm where the paper is silent."""

    dataset: Literal["mnist", "fashion-mnist", "mnist10k"] = "mnist"
    """mnist10k: 10,000 digits that come with the recipes, no download."""
    quick: bool = False
    """A minute on two CPU cores: mnist10k, ResNet-18, one seed, 4 epochs, larger steps. Other options still count."""

    @property
    def usual(self) -> Config:
        """What `--quick` stands for, if it was given."""
        return QUICK if self.quick else MnistConfig()


# A minute on two cores is two epochs of ResNet-50, too short for RDP: 94.1 % (row mode, seed 0).
# ResNet-18 is about four times as fast.
QUICK = MnistConfig(
    quick=True,
    dataset="mnist10k",
    model="resnet18",
    seeds=1,
    epochs=4,
    lr=0.1,
    warmup_epochs=0.4,
    label_smoothing=0.0,
)


def configure(args: list[str]) -> MnistConfig:
    """Read the command line."""
    return parse(MnistConfig, args, default=QUICK if "--quick" in args else None)


if __name__ == "__main__":
    config = command_line(configure)  # before the imports below, which take seconds

with interruptible():
    from engine.launch import World
    from engine.loaders import open_loaders
    from engine.main import main
    from engine.model import make_model
    from engine.train import train


def run(config: MnistConfig, seed: int, world: World) -> None:
    """Train one seed."""
    with open_loaders(config, seed, world) as (train_data, test_data):
        model = make_model(config, classes=train_data.classes, channels=train_data.channels)
        train(model, train_data, test_data, config=config, seed=seed, world=world)


if __name__ == "__main__":
    main(config, run)
