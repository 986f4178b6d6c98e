"""Draw the paper's Figures 1 to 4 from a checkpoint of recipes/spiral_mlp.py, and compare runs of several seeds.

    python tools/figures.py draw runs/spiral_mlp/DATE/standard/checkpoint.pt --out figures
    python tools/figures.py compare runs/spiral_mlp/* --out figures

`draw` writes figure1.png (every layer and node), figure2.png (the same, sampled to 6 of each, readable at a glance),
figure3.png (similarity of layers) and figure4.png (features over training). `compare` prints a table, accuracy and
feature reuse as mean and standard deviation over seeds, and draws the distance of the layers to the input.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import project_paths  # noqa: F401
import torch
import tyro
from spiral_mlp import ALGORITHMS, GRID, ResidualMLP, test
from torch import Tensor

import rdp
from rdp.analysis import FeatureReuse, cka_matrix, distance_matrix, extract_features, feature_reuse, grid, spiral
from rdp.tensorboard import Image, Layer, comparison_panel, feature_panel, node_maps, png, similarity_panel

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


@dataclass(frozen=True)
class Measured:
    """One trained network."""

    accuracy: float
    reuse: FeatureReuse
    distance: Tensor
    cka: Tensor


def measure(checkpoint: Checkpoint) -> Measured:
    """Test a network and compare its layers."""
    model, features = features_of(checkpoint, checkpoint["model"])
    accuracy = test(model, *spiral(checkpoint["samples"], seed=2 * checkpoint["seed"] + 1))
    return Measured(accuracy, feature_reuse(features), distance_matrix(features)[0], cka_matrix(features)[0])


def compare(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("figures")) -> None:
    """Compare algorithms over seeds, and networks of each depth apart.

    Args:
        runs: Folders of finished runs of the recipe, with any seeds.
        out: Folder for the pictures.
    """
    paths = [path for run in runs for name in ALGORITHMS if (path := run / name / "checkpoint.pt").exists()]
    if not paths:
        raise SystemExit(f"no */checkpoint.pt of any algorithm in {', '.join(map(str, runs)) or 'no folder'}")
    groups: dict[str, dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        state = load(path)
        size = f"depth {state['depth']}, width {state['width']}, {state['epoch']} epochs"
        groups[size][state["algorithm"]].append(measure(state))
    pictures = {}
    for size, algorithms in groups.items():
        print(f"{size}\n\n{table(algorithms)}\n")
        distances = {name: torch.stack([m.distance for m in found]) for name, found in algorithms.items()}
        ckas = {name: torch.stack([m.cka for m in found]) for name, found in algorithms.items()}
        name = f"comparison_{size.split(',')[0]}".replace(" ", "_")
        if name in pictures:  # another width, or another number of epochs
            name = f"comparison_{size}".replace(", ", "_").replace(" ", "_")
        pictures[name] = comparison_panel(distances, ckas, title=size)
    write(pictures, out)


def table(algorithms: dict[str, list[Measured]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| | seeds | test accuracy, % | reused | recreated |", "|---|---|---|---|---|"]
    for name, found in algorithms.items():
        columns = [
            spread([100 * m.accuracy for m in found], 2),
            spread([m.reuse.reused for m in found], 3),
            spread([m.reuse.recreated for m in found], 3),
        ]
        lines.append(f"| {name} | {len(found)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


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
