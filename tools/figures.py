"""Draw the paper's Figures 1 to 4 from a checkpoint of recipes/spiral_mlp.py, and compare runs of any recipe.

    python tools/figures.py draw runs/spiral_mlp/DATE/standard/checkpoint.pt --out figures
    python tools/figures.py compare runs/spiral_mlp/* --out figures
    python tools/figures.py compare results/mnist10k/resnet18/standard results/mnist10k/resnet18/rdp-row-0.1

`draw` writes figure1.png (every layer and node), figure2.png (the same, sampled to 6 of each, readable at a glance),
figure3.png (similarity of layers) and figure4.png (features over training). `compare` prints a table, accuracy, feature
reuse and cost as mean and standard deviation over seeds, and draws similarity, lesions, accuracy and cost into one
figure, comparison.png and comparison.pdf.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import project_paths  # noqa: F401
import torch
import tyro
from comparison import comparison_figure, grouped, read_runs, save, table
from spiral_mlp import GRID, ResidualMLP
from torch import Tensor

import rdp
from rdp.analysis import extract_features, grid, spiral
from rdp.tensorboard import Image, Layer, feature_panel, node_maps, png, similarity_panel

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


def nodes_picture(
    checkpoint: Checkpoint, state: dict[str, Tensor], title: str, max_layers: int | None, max_nodes: int | None
) -> Image:
    """The feature panel of the network with the given parameters."""
    model, features = features_of(checkpoint, state)
    weights = [None, *(layer[0].weight for layer in model.layers)]
    layers = [Layer(node_maps(values, GRID), weight) for values, weight in zip(features, weights, strict=True)]
    points, labels = spiral(checkpoint["samples"], seed=2 * checkpoint["seed"])
    return feature_panel(layers, title=title, points=points, labels=labels, max_layers=max_layers, max_nodes=max_nodes)


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
    films = [nodes_picture(state, moments[epoch], f"{state['algorithm']}, epoch {epoch}", 6, 2) for epoch in shown]
    pictures = {
        "figure1": nodes_picture(state, state["model"], name, None, None),
        "figure2": nodes_picture(state, state["model"], name, 6, 6),
        "figure3": similarity_panel(features_of(state, state["model"])[1], title=name),
        "figure4": np.concatenate(films),
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
    tyro.extras.subcommand_cli_from_dict({"draw": draw, "compare": compare}, description=__doc__)
