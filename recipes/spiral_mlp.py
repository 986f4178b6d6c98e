"""The paper's spiral probe: does a residual MLP reuse its features, under standard training, DropPath and RDP?

    python recipes/spiral_mlp.py                            # half a minute on a laptop, all three algorithms
    python recipes/spiral_mlp.py --preset paper-large       # section 3.1 of the paper: depth 32, 1000 epochs
    python recipes/spiral_mlp.py --depth 12 --epochs 50 --algorithm rdp

Prints the test accuracies side by side, writes what TensorBoard shows and the same pictures as PNG, and says where.
A run that was stopped, by Ctrl-C or by `kill -9`, goes on with `--resume FOLDER`.

Source: section 3.1 of Park (2024), https://arxiv.org/abs/2411.09475
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import engine  # noqa: F401 (first: Ctrl-C ends its imports)
import tyro
from engine import Range, RunError, command_line, explained, interruptible
from engine.ranges import check_ranges


@dataclass(frozen=True)
class Config:
    """Train a residual MLP on two spirals. The defaults are those of --preset quick."""

    preset: Literal["quick", "paper-small", "paper-large"] = "quick"
    """quick: half a minute. paper-small, paper-large: section 3.1 as it stands; minutes and an hour."""
    algorithm: Literal["standard", "droppath", "rdp", "all"] = "all"
    """standard: plain. droppath: drop rows and rescale. rdp: drop and freeze in turn."""
    rate: Annotated[float, Range(0, below=1)] = 0.1
    """Drop rate of the last layer; it grows linearly from 0 at the first."""
    depth: Annotated[int, Range(1)] = 6
    """Number of residual layers."""
    width: Annotated[int, Range(2)] = 6
    """Nodes of a layer, at least the two coordinates of a point."""
    epochs: Annotated[int, Range(1)] = 20
    """Passes over the training points."""
    batch_size: Annotated[int, Range(1)] = 256
    """Points in an optimizer step."""
    lr: Annotated[float, Range(above=0)] = 0.03
    """Learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Coefficients of Adam's running averages."""
    anneal: bool = True
    """Let the learning rate fall to 0 along a cosine; the paper keeps it constant."""
    samples: Annotated[int, Range(1)] = 16_384
    """Training points, and as many new ones for the test."""
    seed: Annotated[int, Range(0, below=2**32)] = 0
    """Of weights, points, their order and the masks."""
    pictures: Annotated[int, Range(0)] = 4
    """Pictures drawn during training; TensorBoard's slider replays them."""
    whole: bool = False
    """Show every layer and node in the pictures, not 6 of each: 32 x 65 cells for paper-large."""
    device: str = "cpu"
    """Where to train; networks as small as these are fastest on the CPU."""
    out: Path | None = None
    """Folder for everything that is written; default: runs/spiral_mlp/DATE."""
    resume: Path | None = None
    """Go on with the run in this folder, with the settings that it was started with."""


PRESETS = {
    "quick": Config(),
    "paper-small": Config(preset="paper-small", depth=6, width=6, epochs=1000, lr=0.1, anneal=False, pictures=20),
    "paper-large": Config(preset="paper-large", depth=32, width=32, epochs=1000, lr=0.1, anneal=False, pictures=20),
}


def configure(args: Sequence[str] | None = None) -> Config:
    """Read the command line: the preset, and over it whatever else is given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="quick")
    preset = first.parse_known_args(args)[0].preset
    config = tyro.cli(Config, args=args, default=PRESETS[preset], description=__doc__)
    untouched = dataclasses.replace(PRESETS[config.preset], preset="quick", resume=config.resume)
    given = [f.name for f in fields(Config) if getattr(config, f.name) != getattr(untouched, f.name)]
    if config.resume is not None and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RunError(f"--resume takes the settings that the run was started with: leave out {options}")
    check_ranges(config)
    if not all(0 <= beta < 1 for beta in config.betas):
        raise RunError(f"--betas must be two numbers, each at least 0 and below 1, not {config.betas}")
    return config


if __name__ == "__main__":
    config = command_line(configure)  # before the imports below, which take seconds

with interruptible():
    import torch
    from engine.config import Config as EngineConfig
    from engine.cost import image_flops, relative_flops
    from engine.interrupt import Action, Interrupts
    from engine.launch import World
    from engine.one_process import finish, load, open_run, save
    from engine.output import best_effort_output
    from engine.progress import tqdm
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy, pad

    import rdp
    from rdp.analysis import FeatureReuse, Lesions, extract_features, feature_reuse, grid, lesions, spiral
    from rdp.tensorboard import Events, Panels, lesion_panel, png

CHECKPOINT_MINUTES = 1 / 6

GRID = 50
"""Side of the grid of points on which features are compared and drawn."""

ALGORITHMS: dict[str, dict[str, Any]] = {
    "standard": {"phases": (rdp.Phase.PLAIN,)},
    "droppath": {"phases": (rdp.Phase.DROP,), "scale_by_keep": True},
    "rdp": {"phases": (rdp.Phase.DROP, rdp.Phase.FREEZE)},
}
"""What `rdp.attach` is told."""


class ResidualMLP(nn.Module):
    """`depth` layers `x + gelu(linear(x))`; the input is padded with zeros to `width`, so that every layer has a
    shortcut and the network could carry its input to the end in identity form.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Class logits, `Tensor[N, 2]`, of points, `Tensor[N, 2]`."""
        x = pad(points, (0, self.width - 2))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@dataclass(frozen=True)
class Result:
    """What one training gave: lesions are of the accuracy in percent, FLOPs of a step beside one of standard."""

    accuracy: float
    reuse: FeatureReuse
    lesions: Lesions
    seconds: float
    relative_flops: float


def train(algorithm: str, config: Config, folder: Path) -> Result:
    """Train with one algorithm, or go on from the checkpoint in `folder`; log and draw into it.

    Raises:
        RunError: the checkpoint is damaged, or cannot be written.
        SystemExit: a signal came; the training is saved.
    """
    torch.manual_seed(config.seed)
    model = ResidualMLP(config.depth, config.width).to(config.device)
    points, labels = (t.to(config.device) for t in spiral(config.samples, seed=2 * config.seed))
    test_set = [t.to(config.device) for t in spiral(config.samples, seed=2 * config.seed + 1)]
    first = points[: config.batch_size], labels[: config.batch_size]
    relative = relative_flops(model, EngineConfig(algorithm=algorithm, rate=config.rate), *first)
    point_flops = image_flops(model, *first)
    handle = rdp.attach(model, config.rate, seed=config.seed, example_inputs=points, **ALGORITHMS[algorithm])
    optimizer = handle.wrap(torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.betas))
    batches = max(len(points) // config.batch_size, 1)
    steps = config.epochs * batches
    last = 0.0 if config.anneal else config.lr
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=last)
    parts = {"model": model, "optimizer": optimizer, "handle": handle, "schedule": schedule}
    values = {name: getattr(config, name) for name in ("depth", "width", "samples", "seed", "rate")}
    values |= {"algorithm": algorithm, "epoch": 0, "step": 0, "snapshots": {}}  # as tools/figures.py reads them
    saved = load(folder / "checkpoint.pt", parts, {"epoch": config.epochs, "step": batches}) or values
    epoch, step, snapshots = saved["epoch"], saved["step"], saved["snapshots"]
    picture_every = max(config.epochs // max(config.pictures, 1), 1)
    started = time.monotonic()
    shown = None if config.whole else 6
    events = Events(folder)
    with (
        tqdm(total=steps, initial=epoch * batches + step, desc=f"{algorithm:8}", unit="step", mininterval=0.2) as bar,
        Panels(
            handle,
            grid(GRID).to(config.device),
            events,
            grid_size=GRID,
            points=points,
            labels=labels,
            images_every=picture_every * batches,
            max_layers=shown,
            max_nodes=shown,
            name=algorithm,
            settings={**dataclasses.asdict(config), "algorithm": algorithm},
        ) as panels,
    ):
        with Interrupts(CHECKPOINT_MINUTES, World(torch.device(config.device))) as interrupts:

            def pause(save_anyway: bool = False) -> None:
                action = interrupts.poll()
                if save_anyway or action is not Action.GO_ON:
                    now = values | {"epoch": epoch, "step": step, "snapshots": snapshots}
                    save(folder / "checkpoint.pt", parts, now)
                if action is Action.STOP:
                    bar.write(f"stopped and saved in {folder.parent}: go on with --resume {folder.parent}")
                    raise SystemExit(interrupts.exit_status)

            while epoch < config.epochs:
                if epoch % picture_every == 0 and epoch not in snapshots:
                    snapshots[epoch] = {name: value.cpu().clone() for name, value in model.state_dict().items()}
                # A function of seed and epoch alone, so that a resumed run sees the same batches.
                generator = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
                order = torch.randperm(len(points), generator=generator).to(config.device)
                for batch in order[: batches * config.batch_size].tensor_split(batches)[step:]:
                    loss = cross_entropy(model(points[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    panels.log(handle.step_count, loss=loss, lr=optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    schedule.step()
                    step += 1
                    bar.update()
                    pause()
                accuracy = test(model, *test_set)
                panels.metrics(handle.step_count, top1=100 * accuracy)
                bar.set_postfix_str(f"test accuracy {accuracy:.2%}")
                epoch, step = epoch + 1, 0
            pause(save_anyway=True)
        panels.draw(handle.step_count)
        panels.save(folder)
        features = list(extract_features(handle, grid(GRID).to(config.device)).values())
        found = lesions(handle, lambda: 100 * test(model, *test_set), progress=False)
        panels.lesions(handle.step_count, found, metric="accuracy, %")
        result = Result(test(model, *test_set), feature_reuse(features), found, time.monotonic() - started, relative)
        numbers = {"dataset": "spiral", "model": f"mlp-{config.depth}x{config.width}", "algorithm": algorithm}
        numbers |= {"seed": config.seed, "top1": 100 * result.accuracy, "lesions": dataclasses.asdict(found)}
        numbers |= {"train_seconds": result.seconds, "relative_flops": relative}
        numbers |= {"flops": relative * point_flops * config.batch_size * steps}
        finish(folder, numbers, features, events, handle.step_count)
    return result


@torch.no_grad()
def test(model: nn.Module, points: Tensor, labels: Tensor) -> float:
    """The fraction of points that the plain model puts into their class."""
    model.eval()
    right = (model(points).argmax(dim=1) == labels).float().mean().item()
    model.train()
    return right


def check_device(device: str) -> None:
    """Refuse a device that is not there, before anything is written."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def report(results: dict[str, Result], config: Config, folder: Path) -> str:
    """What is printed at the end."""
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
    lines = [f"{'':10}{'test accuracy':>14}{'without one':>13}{'reused':>9}{'recreated':>11}{'FLOPs':>8}{'seconds':>9}"]
    for algorithm, r in results.items():
        lesioned = sum(lesion.metric for lesion in r.lesions.table) / len(r.lesions.table)
        lines.append(
            f"{algorithm:10}{r.accuracy:>14.2%}{lesioned:>12.2f}%{r.reuse.reused:>9.2f}{r.reuse.recreated:>11.2f}"
            f"{r.relative_flops:>8.2f}{r.seconds:>9.1f}"
        )
    lines.append("(without one: mean accuracy without one of the branches, see docs/shallower.md and lesions.png;")
    lines.append("reused, recreated: the two parts of the similarity between layers, see docs/feature_reuse.md; FLOPs:")
    lines.append("of a step, beside standard; seconds: nearly all overhead in so small a network, see docs/cost.md)\n")
    lines.append(f"Pictures    {folder}/*/*.png, such as {folder / next(iter(results)) / 'features_nodes.png'}")
    lines.append(f"TensorBoard {python} -m tensorboard.main --logdir {folder}, then open http://localhost:6006")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the recipe with these arguments."""
    return run(configure(args))


def run(config: Config) -> dict[str, Result]:
    """Run the recipe and print its report.

    Raises:
        RunError: something is wrong that the user can put right.
        SystemExit: a signal came; the run is saved.
    """
    check_device(config.device)
    folder = config.resume or config.out or Path("runs", "spiral_mlp", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    with open_run(folder, config, resume=config.resume is not None) as config:
        torch.set_num_threads(1)  # a layer of this size is done before a second thread has woken up
        algorithms = list(ALGORITHMS) if config.algorithm == "all" else [config.algorithm]
        print(f"depth {config.depth}, width {config.width}, {config.epochs} epochs of {config.samples} points")
        results = {name: train(name, config, folder / name) for name in algorithms}
        picture = lesion_panel({name: result.lesions for name, result in results.items()}, metric="accuracy, %")
        (folder / "lesions.png").write_bytes(png(picture))
        print(report(results, config, folder))
        return results


if __name__ == "__main__":
    with best_effort_output(), explained(less="choose a smaller --batch-size, or fewer --samples"):
        run(config)
