"""CIFAR-10: 32x32 in colour, padded by 4, cropped at random and flipped.

    python recipes/cifar10.py --data-dir FOLDER --quick              # a minute on two cores, a small network
    python recipes/cifar10.py --download                             # ResNet-50, RDP, five seeds
    python recipes/cifar10.py --download --algorithm droppath --model resnet50d
    python recipes/cifar10.py --download --small-stem                # the custom stem for 32x32, not the paper's
    python recipes/cifar10.py --help

--data-dir holds torchvision's cifar-10-batches-py, or class folders of the images: train/CLASS/* and test/CLASS/*.
Results go to results/DATASET/MODEL/ALGORITHM/seed-N; tools/table1.py makes the table of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine import Config, command_line, interruptible, parse


@dataclass(frozen=True)
class Cifar10Config(Config):
    """Train on CIFAR-10. Defaults: Park 2024, section 4, and timm where the paper is silent."""

    dataset: Literal["cifar10"] = "cifar10"
    """The only one here."""
    quick: bool = False
    """A minute on two CPU cores: 5,000 images, a narrow ResNet-18, one seed, 8 epochs. Other options still count."""

    @property
    def usual(self) -> Config:
        """What `--quick` stands for, if it was given."""
        return QUICK if self.quick else Cifar10Config()


QUICK = Cifar10Config(
    quick=True,
    model="resnet18",
    model_kwargs=("channels=(16,32,64,128)",),
    small_stem=True,
    stem_stride=2,
    limit=5000,
    limit_test=2000,
    seeds=1,
    epochs=8,
    batch_size=64,
    lr=0.05,
    warmup_epochs=1,
    label_smoothing=0.0,
)


def configure(args: list[str]) -> Cifar10Config:
    """Read the command line."""
    return parse(Cifar10Config, args, default=QUICK if "--quick" in args else None)


if __name__ == "__main__":
    config = command_line(configure)  # before the imports below, which take seconds

with interruptible():
    from engine.launch import World
    from engine.loaders import open_loaders
    from engine.main import main
    from engine.model import make_model
    from engine.train import train


def run(config: Cifar10Config, seed: int, world: World) -> None:
    """Train one seed."""
    with open_loaders(config, seed, world) as (train_data, test_data):
        model = make_model(config, classes=train_data.classes, channels=train_data.channels)
        train(model, train_data, test_data, config=config, seed=seed, world=world)


if __name__ == "__main__":
    main(config, run)
