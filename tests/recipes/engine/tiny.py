"""A run so small that it takes a second: a residual network, its data, and `train` around them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from engine import Config
from engine.checkpoint import load_latest
from engine.launch import World, join
from engine.lock import claim
from engine.train import train
from torch import Tensor, nn

CLASSES = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class TinyNet(nn.Module):
    """Three residual blocks, BatchNorm and dropout: everything that a checkpoint has to restore."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(8) for _ in range(3)])
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))


class Crash(BaseException):
    """The stand-in for a power cut: nothing in the engine may catch it."""


def crash() -> None:
    raise Crash


class TinyData:
    """Noisy stripes whose direction is the label; a pure function of the epoch and the batch, like real loaders."""

    kind = "memory"
    classes = CLASSES
    channels = 1
    listing = "stripes"

    def __init__(
        self, batches: int, batch_size: int, at: tuple[int, int] | None = None, do: Callable[[], None] = crash
    ) -> None:
        self.batches, self.batch_size, self.at, self.do = batches, batch_size, at, do
        self.samples = batches * batch_size

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in range(start, self.batches):
            if self.at == (epoch, batch):
                self.do()
            generator = torch.Generator().manual_seed(1000 * epoch + batch)
            labels = torch.randint(CLASSES, (self.batch_size,), generator=generator)
            images = torch.randn(self.batch_size, 1, 6, 6, generator=generator)
            for image, label in zip(images, labels, strict=True):
                image[0, int(label)] += 2
            yield images, labels

    def close(self) -> None:
        pass


def tiny_config(out: Path, **settings: Any) -> Config:
    defaults = {"algorithm": "standard", "epochs": 3, "batch_size": 16, "lr": 0.05, "warmup_epochs": 1, "seeds": 1}
    return Config(out=out, resume=True, progress=False, device="cpu", **(defaults | settings))


def train_tiny(
    config: Config,
    at: tuple[int, int] | None = None,
    do: Callable[[], None] = crash,
    world: World | None = None,
    batches: int = 4,
) -> dict[str, Any]:
    """Train; when the training batch `at` (epoch, batch) is asked for, `do` something, such as crash."""
    world = world or World(torch.device("cpu"))
    torch.manual_seed(0)
    training = TinyData(batches * config.accumulate, config.micro_batch(world.size), at, do)
    return train(TinyNet(), training, TinyData(2, 20), config=config, seed=0, world=world)


def final_state(config: Config) -> dict[str, Any]:
    state = load_latest(config.folder / "seed-0" / "checkpoints")
    assert state is not None
    return state


def run_in_process(out: str, settings: dict[str, Any]) -> None:
    """What a child process runs; it must be importable."""
    torch.set_num_threads(1)
    train_tiny(tiny_config(Path(out), **settings))
    os._exit(0)  # skip the interpreter's teardown: the parent looks only at files


def run_rank(rank: int, size: int, port: int, out: str, settings: dict[str, Any], cut: dict[int, str]) -> None:
    """One of several processes that train together.

    Args:
        rank: of this process.
        size: how many there are.
        port: where they meet.
        out: the results folder.
        settings: of the configuration.
        cut: what happens to which rank in the second step of the second epoch: "crash" or "signal".
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = tiny_config(Path(out), **settings)
    do = {"crash": lambda: os._exit(3), "signal": lambda: os.kill(os.getpid(), signal.SIGTERM)}
    at = (1, config.accumulate) if rank in cut else None
    with join(config) as world:
        train_tiny(config, at, do.get(cut.get(rank, ""), crash), world)


def hold_folder(folder: str) -> None:
    """Hold a folder until the process is killed."""
    with claim(Path(folder)):
        Path(folder, "held").touch()
        signal.pause()
