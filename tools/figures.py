"""Draw the paper's Figures 1 to 4 from a checkpoint of recipes/spiral_mlp.py, and compare runs of any recipe.

    python tools/figures.py draw runs/spiral_mlp/DATE/standard/checkpoint.pt --out figures
    python tools/figures.py compare runs/spiral_mlp/* --out figures
    python tools/figures.py pictures results/mnist10k/resnet18/rdp-row-0.1/seed-0 --out figures
    python tools/figures.py compare results/mnist10k/resnet18/standard results/mnist10k/resnet18/rdp-row-0.1

`draw` writes figure1.png (every layer and node), figure2.png (the same, at most 8 layers and 6 nodes, readable at a
glance), figure3.png (similarity of layers) and figure4.png (figure2 over training, with one colour scale). `compare`
prints a table, accuracy, feature reuse and cost as mean and standard deviation over seeds, and draws similarity,
lesions, accuracy and cost into one figure, comparison.png and comparison.pdf. `pictures` writes what TensorBoard
shows last.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible
from engine.command import later


def draw(checkpoint: tyro.conf.Positional[Path], out: Path = Path("figures")) -> None:
    """Draw Figures 1 to 4 of one trained network.

    Args:
        checkpoint: checkpoint.pt in the folder of an algorithm.
        out: Folder for the pictures.
    """
    state = load(checkpoint)
    name = f"{state['algorithm']}, depth {state['depth']}, epoch {state['epoch']}"
    moments = {**state["snapshots"], state["epoch"]: state["model"]}
    shown = sorted(moments)[:: max(len(moments) // 4, 1)][:4]
    shown = sorted({*shown[:3], max(moments)})
    points, labels = spiral(state["samples"], seed=2 * state["seed"])
    layers = layers_of(state, state["model"])
    pictures = {
        "figure1": feature_panel(layers, title=name, points=points, labels=labels, max_layers=None, max_nodes=None),
        "figure2": feature_panel(layers, title=name, points=points, labels=labels),
        "figure3": similarity_panel(features_of(state, state["model"])[1], title=name),
        "figure4": feature_film(
            {f"epoch {epoch}": layers_of(state, moments[epoch]) for epoch in shown},
            title=f"{state['algorithm']}, depth {state['depth']}, over training",
            points=points,
            labels=labels,
        ),
    }
    write(pictures, out)


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("figures"), name: str = "comparison"
) -> None:
    """Compare two or more finished runs; those that differ in the seed alone are one line.

    Args:
        runs: Their folders, or folders above them.
        out: Folder for the figure.
        name: What the figure is called there.
    """
    groups = grouped(read_runs(runs))
    print(f"{table(groups)}\n")
    figure = comparison_figure(groups)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / f"{name}.png", out / f"{name}.pdf"):
            save(figure, path)
            print(path)
    except OSError as error:
        raise SystemExit(f"cannot write to {out}: {error.strerror}") from error


def pictures(run: tyro.conf.Positional[Path], out: Path = Path("figures")) -> None:
    """Write the latest pictures of a TensorBoard run as PNG files.

    Args:
        run: A folder with events, or one above it.
        out: Folder for the pictures.
    """
    latest = {}
    for path in sorted(run.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "images" or value.tag in latest:
                    latest[value.tag] = value.tensor.string_val[-1]
    if not latest:
        raise SystemExit(f"no pictures in the events of {run}: train with --panels")
    out.mkdir(parents=True, exist_ok=True)
    for tag, content in latest.items():
        (path := out / f"{tag.replace('/', '_')}.png").write_bytes(content)
        print(path)


if __name__ == "__main__":
    commands = {"draw": later(draw), "compare": later(compare), "pictures": later(pictures)}
    with interruptible():  # and before the imports below, which take seconds
        run = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)

with interruptible():
    import torch
    from comparison import comparison_figure, grouped, read_runs, save, table
    from spiral_mlp import GRID, ResidualMLP
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from torch import Tensor

    import rdp
    from rdp.analysis import extract_features, grid, spiral
    from rdp.tensorboard import Image, Layer, feature_film, feature_panel, layer_of, png, similarity_panel

Checkpoint = dict[str, Any]


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of the recipe."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"cannot read the checkpoint {path}: {error}") from error
    if not isinstance(state, dict) or "snapshots" not in state:
        raise SystemExit(f"{path} is no checkpoint of recipes/spiral_mlp.py")
    return state


def features_of(checkpoint: Checkpoint, state: dict[str, Tensor]) -> tuple[ResidualMLP, list[Tensor]]:
    """The network with the given parameters, and its features on the grid, each `Tensor[2500, width]`."""
    model = ResidualMLP(checkpoint["depth"], checkpoint["width"])
    model.load_state_dict(state)
    with rdp.attach(model, rate=0, example_inputs=grid(GRID)) as handle:
        return model, list(extract_features(handle, grid(GRID)).values())


def layers_of(checkpoint: Checkpoint, state: dict[str, Tensor]) -> list[Layer]:
    """The layers of the feature panel of the network with the given parameters."""
    model, features = features_of(checkpoint, state)
    weights = [None, *(layer[0].weight for layer in model.layers)]
    names = ["input", *[""] * len(model.layers)]
    return [
        layer_of(values, GRID, weights=weight, name=name)
        for values, weight, name in zip(features, weights, names, strict=True)
    ]


def write(pictures: dict[str, Image], out: Path) -> None:
    """Write PNG files and say where."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (out / f"{name}.png").write_bytes(png(picture))
            print(f"{out / name}.png")
    except OSError as error:
        raise SystemExit(f"cannot write to {out}: {error.strerror}") from error


if __name__ == "__main__":
    with explained():
        run()
