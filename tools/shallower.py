"""How shallow may a trained network get? Standard training, DropPath and RDP on Fashion-MNIST, several seeds.

    python tools/shallower.py DATA_DIR                    # the figure of docs/shallower.md
    python tools/shallower.py DATA_DIR --epochs 1 --seeds 1 --limit 5000

Trains a small vision transformer of 12 branches with each algorithm, measures on the test images what each branch is
worth, and draws accuracy over the number of branches that are kept. Each network's lesions are saved in the folder of
results as they are measured, and are not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import project_paths  # noqa: F401
import tyro
from engine import Range, RunError, explained, interruptible
from engine.ranges import check_ranges


@dataclass(frozen=True)
class Config:
    """Train, measure, draw."""

    data_dir: Annotated[Path, tyro.conf.Positional]
    """Where the files of Fashion-MNIST are (train-images-idx3-ubyte.gz and the others)."""
    out: Path = Path("results", "shallower")
    """Folder of results."""
    picture: Path | None = None
    """Where the figure is written; default: lesions.png in the folder of results."""
    seeds: Annotated[int, Range(1)] = 3
    """Networks of each algorithm."""
    epochs: Annotated[int, Range(1)] = 4
    """Passes over the training images."""
    limit: Annotated[int | None, Range(1)] = 15_000
    """Train on this many of the 60,000 images."""
    test_limit: Annotated[int | None, Range(1)] = 2_000
    """Test on this many of the 10,000 images."""
    draws: Annotated[int, Range(1)] = 1
    """How many times branches are removed at random."""
    rate: Annotated[float, Range(0, below=1)] = 0.2
    """Drop rate of the last block; it grows linearly from 0 at the first."""
    depth: Annotated[int, Range(2)] = 6
    """Blocks, of two branches each."""
    patch: Annotated[int, Range(1, most=28)] = 14
    """Side of the patches that tokens are made of; 28 must be a multiple."""
    dim: Annotated[int, Range(4)] = 64
    """Width of a token, a multiple of 4."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images in a step."""
    lr: Annotated[float, Range(above=0)] = 2e-3
    """Peak learning rate of AdamW, which falls to 0 along a line."""
    algorithms: tuple[Literal["standard", "droppath", "rdp"], ...] = ("standard", "droppath", "rdp")
    """Which of standard, droppath and rdp."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            RunError: a setting is out of its range, named with its value.
        """
        check_ranges(self)
        if 28 % self.patch or self.dim % 4:
            raise RunError(f"28 must be a multiple of --patch {self.patch}, and --dim {self.dim} one of 4")
        if not self.algorithms:
            raise RunError("--algorithms names none: leave it out for all three")

    def training(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("data_dir", "out", "picture", "seeds")}


if __name__ == "__main__":
    with explained(), interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Config, description=__doc__)


with interruptible():
    import torch
    from data.loader import make_loader
    from engine.files import write_atomically
    from engine.progress import tqdm
    from spiral_mlp import ALGORITHMS
    from timm.models import VisionTransformer
    from torch.nn.functional import cross_entropy

    import rdp
    from rdp.analysis import Lesion, Lesions, lesions
    from rdp.tensorboard import lesion_panel, png


def measure(algorithm: str, seed: int, config: Config) -> Lesions:
    """Train one network, and take its branches away."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"patch_size": config.patch, "embed_dim": config.dim, "depth": config.depth}
    model = VisionTransformer(img_size=28, in_chans=1, num_classes=10, num_heads=4, **size)
    split = {"batch_size": config.batch_size, "device": "cpu", "data_dir": config.data_dir, "seed": seed}
    train = make_loader("fashion-mnist", "train", train=True, drop_last=True, limit=config.limit, **split)
    test = make_loader("fashion-mnist", "test", train=False, limit=config.test_limit, **split)
    with closing(train), closing(test):
        images, _ = next(iter(train.epoch(0)))
        handle = rdp.attach(model, config.rate, seed=seed, example_inputs=images[:2], **ALGORITHMS[algorithm])
        optimizer = handle.wrap(torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.05))
        steps = config.epochs * len(train)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        )
        with tqdm(total=steps, desc=f"{algorithm} {seed}", unit="step") as bar:
            for epoch in range(config.epochs):
                for images, labels in train.epoch(epoch):
                    loss = cross_entropy(model(images), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
        batches = list(test.epoch(0))

        @torch.no_grad()
        def accuracy() -> float:
            right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
            return 100 * right / sum(len(labels) for _, labels in batches)

        return lesions(handle, accuracy, points=None, random=config.draws)


def saved(path: Path, config: Config) -> Lesions | None:
    """What was measured before, if with these settings."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        training, numbers = content["training"], content["lesions"]
        result = Lesions(
            numbers["whole"],
            numbers["higher_is_better"],
            tuple(Lesion(**each) for each in numbers["table"]),
            {int(number): metric for number, metric in numbers["least"].items()},
            {int(number): tuple(drawn) for number, drawn in numbers["random"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}): remove it, and it is made again") from error
    if training != json.loads(json.dumps(config.training())):
        raise RunError(f"{path} is of other settings, {training}: choose another --out")
    return result


def main(config: Config) -> None:
    """Train what is not there yet, and draw."""
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    picture = config.picture or config.out / "lesions.png"
    if not picture.parent.is_dir():  # an hour is too late to learn it
        raise RunError(f"--picture {picture}: there is no folder {picture.parent}")
    found: dict[str, list[Lesions]] = {algorithm: [] for algorithm in config.algorithms}
    for seed in range(config.seeds):
        for algorithm, each in found.items():
            path = config.out / f"{algorithm}-{seed}.json"
            result = saved(path, config)
            if result is None:
                result = measure(algorithm, seed, config)
                content = {"training": config.training(), "lesions": dataclasses.asdict(result)}
                write_atomically(path, json.dumps(content, indent=1).encode())
            each.append(result)
    total = 2 * config.depth
    kept = [total, total * 3 // 4, total // 2, total // 4]
    print(f"{'branches kept':<14}" + "".join(f"{number:>16}" for number in kept))
    for algorithm, each in found.items():
        for name in ("least", "random"):
            cells = []
            for number in kept:
                curves = [getattr(result, name)[total - number] for result in each]
                values = [statistics.mean(v) if isinstance(v, tuple) else v for v in curves]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):>9.1f} ± {spread:4.1f}")
            print(f"{algorithm:9}{name:6}" + "".join(cells))
    picture.write_bytes(png(lesion_panel(found, title="Fashion-MNIST: what is left of accuracy", metric="accuracy")))
    print(picture)


if __name__ == "__main__":
    with explained(less="choose a smaller --batch-size"):
        main(args)
