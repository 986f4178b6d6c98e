"""Time the pictures of a 32 x 32 residual MLP on one CPU core, beside drawing the same with one matplotlib Axes a node.

    python tools/benchmark_panels.py
    python tools/benchmark_panels.py --repetitions 1

Prints the best of several repetitions. The naive panel is drawn for 4 of the 33 columns and scaled up: the time of
matplotlib grows with the number of Axes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible
from engine.command import later


def main(repetitions: int = 5) -> None:
    """Time the pictures of a 32 x 32 residual MLP on one CPU core.

    Args:
        repetitions: Of each picture; the best is printed.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, probe = MLP(), grid(GRID)
    handle = rdp.attach(model, example_inputs=probe)
    points, labels = spiral()
    features = list(extract_features(handle, probe).values())
    layers = [
        Layer(node_maps(values, GRID), weight)
        for values, weight in zip(features, [None, *(layer[0].weight for layer in model.layers)], strict=True)
    ]

    def analyse() -> None:
        found = list(extract_features(handle, probe).values())
        for compare in (distance_matrix, cosine_matrix, cka_matrix):
            compare(found)

    def sample() -> None:
        png(feature_panel(layers, points=points, labels=labels))

    def whole() -> None:
        png(feature_panel(layers, points=points, labels=labels, max_layers=None, max_nodes=None))

    naive = best_seconds(lambda: naive_panel(layers[:NAIVE_COLUMNS], points, labels), 1)
    naive *= len(layers) / NAIVE_COLUMNS
    rows = [
        ("features and similarity", best_seconds(analyse, repetitions), 0.2),
        ("feature panel, 8 x 6 nodes, PNG", best_seconds(sample, repetitions), 1.0),
        ("feature panel, 32 x 65, PNG", best_seconds(whole, repetitions), 3.0),
        ("similarity panel", best_seconds(lambda: similarity_panel(features), repetitions), 1.0),
    ]
    print(f"torch {torch.__version__}, matplotlib {matplotlib.__version__}, one thread, CPU time")
    print(f"{'':32}{'seconds':>9}{'target':>9}{'naive / this':>14}")
    for name, seconds, target in rows:
        ratio = f"{naive / seconds:.0f}" if "32 x 65" in name else "-"
        print(f"{name:32}{seconds:>9.3f}{target:>9.1f}{ratio:>14}")
    print(
        f"{'32 x 65, one Axes a node':32}{naive:>9.1f}{'':>9}{1:>14}   (from {NAIVE_COLUMNS} of {len(layers)} columns)"
    )


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        run = tyro.cli(later(main), description=__doc__)


with interruptible():
    import matplotlib
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    import rdp
    from rdp.analysis import cka_matrix, cosine_matrix, distance_matrix, extract_features, grid, spiral
    from rdp.tensorboard import Layer, feature_panel, node_maps, png, similarity_panel
    from rdp.tensorboard.colors import SIGNED

DEPTH = WIDTH = 32
GRID = 50
NAIVE_COLUMNS = 4


class MLP(nn.Module):
    """The network of the paper's Figure 1, untrained: the time does not depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH))

    def forward(self, points: Tensor) -> Tensor:
        """The last layer, `Tensor[N, 32]`."""
        x = nn.functional.pad(points, (0, WIDTH - 2))
        for layer in self.layers:
            x = x + layer(x)
        return x


def best_seconds(work: Callable[[], object], repetitions: int) -> float:
    """The least CPU time, which other processes on the machine hardly disturb."""
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def naive_panel(layers: list[Layer], points: Tensor, labels: Tensor) -> None:
    """One Axes a node with its contour, and one a layer with a line a weight, as one would write it first."""
    figure = Figure(figsize=(2 * len(layers), WIDTH))
    axes = figure.subplots(WIDTH, 2 * len(layers) - 1)
    for column, layer in enumerate(layers):
        for node, values in enumerate(layer.maps):
            cell = axes[node][2 * column]
            cell.imshow(values, cmap=SIGNED, extent=(-1, 1, -1, 1))
            cell.contour(values.flip(0), levels=[0], extent=(-1, 1, -1, 1), colors="black")
            cell.set_axis_off()
            if column == len(layers) - 1:
                cell.scatter(*points[::256].T, c=labels[::256], s=1)
            elif layers[column + 1].weights is not None:
                lines = axes[node][2 * column + 1]
                strongest = layers[column + 1].weights[node].abs().topk(2).indices.tolist()
                for source in strongest:
                    lines.plot([0, 1], [source - node, 0], linewidth=1)
                lines.set_axis_off()
    FigureCanvasAgg(figure).draw()


if __name__ == "__main__":
    with explained():
        run()
