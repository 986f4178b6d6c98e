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
from typing import Annotated, Any

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass(frozen=True)
class Config:
    """Train, measure, draw."""

    data_dir: Annotated[Path, tyro.conf.Positional]
    """Where the files of Fashion-MNIST are (train-images-idx3-ubyte.gz and the others)."""
    out: Path = Path("results", "shallower")
    """Folder of results."""
    picture: Path | None = None
    """Where the figure is written; default: lesions.png in the folder of results."""
    seeds: int = 3
    """Networks of each algorithm."""
    epochs: int = 4
    """Passes over the training images."""
    limit: int | None = 15_000
    """Train on this many of the 60,000 images."""
    test_limit: int | None = 2_000
    """Test on this many of the 10,000 images."""
    draws: int = 1
    """How many times branches are removed at random."""
    rate: float = 0.2
    """Drop rate of the last block; it grows linearly from 0 at the first."""
    depth: int = 6
    """Blocks, of two branches each."""
    patch: int = 14
    """Side of the patches that tokens are made of; 28 must be a multiple."""
    dim: int = 64
    """Width of a token."""
    batch_size: int = 128
    """Images in a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, which falls to 0 along a line."""
    algorithms: tuple[str, ...] = ("standard", "droppath", "rdp")
    """Which of standard, droppath and rdp."""

    def training(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("data_dir", "out", "picture", "seeds")}


if __name__ == "__main__":
    args = tyro.cli(Config, description=__doc__)  # before what takes seconds to import


with interruptible():
    import torch
    from data.loader import make_loader
    from spiral_mlp import ALGORITHMS
    from timm.models import VisionTransformer
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

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
    content = json.loads(path.read_text())
    if content["training"] != json.loads(json.dumps(config.training())):
        raise SystemExit(f"{path} is of other settings, {content['training']}: choose another --out")
    numbers = content["lesions"]
    return Lesions(
        numbers["whole"],
        numbers["higher_is_better"],
        tuple(Lesion(**each) for each in numbers["table"]),
        {int(number): metric for number, metric in numbers["least"].items()},
        {int(number): tuple(drawn) for number, drawn in numbers["random"].items()},
    )


def main(config: Config) -> None:
    """Train what is not there yet, and draw."""
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Lesions]] = {algorithm: [] for algorithm in config.algorithms}
    for seed in range(config.seeds):
        for algorithm, each in found.items():
            path = config.out / f"{algorithm}-{seed}.json"
            result = saved(path, config)
            if result is None:
                result = measure(algorithm, seed, config)
                content = {"training": config.training(), "lesions": dataclasses.asdict(result)}
                path.write_text(json.dumps(content, indent=1))
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
    picture = config.picture or config.out / "lesions.png"
    picture.write_bytes(png(lesion_panel(found, title="Fashion-MNIST: what is left of accuracy", metric="accuracy")))
    print(picture)


if __name__ == "__main__":
    with explained(less="choose a smaller --batch-size"):
        main(args)
