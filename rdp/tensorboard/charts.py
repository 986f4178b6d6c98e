"""Curves and heatmaps: how alike the layers are (the paper's Figure 3), and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rdp.analysis.lesions import Lesions
from rdp.analysis.reuse import feature_reuse
from rdp.analysis.similarity import cka_matrix, cosine_matrix, distance_matrix
from rdp.tensorboard.colors import LINES, MAGNITUDE, UNDEFINED, Image

_TEXT: dict[Any, Any] = {"font.size": 13, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False}


def similarity_panel(features: Sequence[Tensor], *, title: str = "How alike are the layers?") -> Image:
    """Draw each layer against the input (curves) and against each other layer (heatmaps).

    Args:
        features: The input and N layers, each `Tensor[N, ...]`, as `extract_features` gives them.
        title: First line of the image.

    Returns:
        The image, `uint8[580, 700, 3]`. On the left Euclidean distance, on the right linear CKA and cosine. Grey
        marks pairs that cannot be compared: distance and cosine need layers of equal shape.

    Raises:
        ArgumentError: As `distance_matrix` and `cka_matrix`.
    """
    distance = distance_matrix(features).numpy()
    cosine = cosine_matrix(features).numpy()
    cka = cka_matrix(features).numpy()
    layers = np.arange(len(features))
    with matplotlib.rc_context(_TEXT):
        figure = _figure(title=f"{title}   {_reuse(features)}")
        (far, near), (distances, similarities) = figure.subplots(2, 2, height_ratios=[2, 3])
        far.plot(layers, distance[0], color=LINES[0], marker="o", markersize=4)
        far.set(title="Distance to the input", ylim=(0, None), xlim=(0, len(layers) - 1))
        near.plot(layers, cka[0], color=LINES[0], marker="o", markersize=4, label="CKA")
        near.plot(layers, cosine[0], color=LINES[1], marker="s", markersize=4, linestyle="--", label="cosine")
        low = min(0.0, float(np.nanmin([cka[0], cosine[0]])))
        near.set(title="Similarity to the input", ylim=(low - 0.03, 1.4), xlim=(0, len(layers) - 1))
        near.set_yticks([tick for tick in (-1, -0.5, 0, 0.5, 1) if tick >= low])
        near.legend(frameon=False, ncols=2, loc="upper right", borderaxespad=0)
        _heatmap(figure, distances, distance, "Distance, all pairs", None)
        _heatmap(figure, similarities, cka, "CKA, all pairs", 1.0)
        for axes in (far, near):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (distances, similarities):
            axes.set(xlabel="layer (0: input)")
        if np.isnan(distance).any():
            far.set_title("Distance to the input")
            distances.set_title("Distance (grey: shapes differ)")
        return _pixels(figure)


def comparison_panel(
    distances: Mapping[str, Tensor], similarities: Mapping[str, Tensor], *, title: str = "Layers against the input"
) -> Image:
    """Draw how far layers are from the input for several ways of training, with several runs of each.

    Args:
        distances: For each name, `Tensor[runs, L]`: Euclidean distance of each layer to the input.
        similarities: For each name, `Tensor[runs, L]`: linear CKA of each layer with the input.
        title: First line of the image.

    Returns:
        The image, `uint8[340, 700, 3]`: means over runs, and bands from the lowest to the highest run.
    """
    with matplotlib.rc_context(_TEXT):
        figure = _figure(title, height=3.4)
        far, near = figure.subplots(1, 2)
        for axes, curves in ((far, distances), (near, similarities)):
            for color, marker, (name, runs) in zip(LINES, "os^v", curves.items(), strict=False):
                mean, low, high = runs.mean(dim=0).numpy(), runs.amin(dim=0).numpy(), runs.amax(dim=0).numpy()
                layers = np.arange(len(mean))
                every = max(len(mean) // 8, 1)
                axes.plot(layers, mean, color=color, marker=marker, markevery=every, markersize=5, label=name)
                axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set(xlabel="layer (0 is the input)", xlim=(0, len(layers) - 1))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        far.set(title="Distance to the input", yscale="symlog", ylim=(0, None))
        near.set(title="CKA with the input", ylim=(-0.03, 1.03))
        near.legend(edgecolor="none", framealpha=0.8)
        return _pixels(figure)


def lesion_panel(
    results: Lesions | Mapping[str, Lesions | Sequence[Lesions]],
    *,
    title: str = "What is each branch worth?",
    metric: str = "metric",
) -> Image:
    """Draw what each branch is worth, and the metric with fewer and fewer branches.

    Args:
        results: What `rdp.analysis.lesions` returned; or that by name, of several runs perhaps, to compare ways of
            training. The networks have the same number of branches.
        title: First line of the image.
        metric: Its name.

    Returns:
        The image, `uint8[340, 700, 3]`: means over runs; bands reach from the lowest to the highest one.
    """
    named = {"": results} if isinstance(results, Lesions) else results
    runs = {name: [each] if isinstance(each, Lesions) else list(each) for name, each in named.items()}
    with matplotlib.rc_context(_TEXT):
        figure = _figure(title, height=3.4)
        bars, curves = figure.subplots(1, 2)
        for place, (color, (name, each)) in enumerate(zip(LINES, runs.items(), strict=False)):
            worth = np.mean([[lesion.worth for lesion in result.table] for result in each], axis=0)
            count, width = len(worth), 0.8 / len(runs)
            bars.bar(np.arange(count) + 1 + width * (place - (len(runs) - 1) / 2), worth, width, color=color)
            ways = [
                (name or "worth least first", "-", [result.least for result in each]),
                ("_" if name else "at random", "--", [_means(result.random) for result in each]),
            ]
            for label, style, by_number in ways:
                kept = [count - number for number in by_number[0]]
                values = np.array([list(one.values()) for one in by_number])
                if values.size:
                    curves.plot(kept, values.mean(0), style, color=color, label=label, marker=".", linewidth=1.5)
                    curves.fill_between(kept, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
        bars.axhline(0, color="black", linewidth=0.8)
        bars.set(title=f"{metric} lost without it", xlabel="branch, in forward order")
        dashed = " (dashed: random)" if "" not in runs else ""
        curves.set(title=f"{metric} left{dashed}", xlabel="branches kept", xlim=(count + 0.3, -0.3))
        for axes in (bars, curves):
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        curves.legend(edgecolor="none", framealpha=0.8, fontsize=10)
        return _pixels(figure)


def _means(drawn: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {number: float(np.mean(values)) for number, values in drawn.items()}


Curves = dict[str, list[tuple[int, float]]]
"""(step, value) by label."""


@dataclass
class History:
    """What the training panel shows."""

    gradient_norm: Curves = field(default_factory=dict)
    """By phase."""
    live: Curves = field(default_factory=dict)
    """Number of parameters that may move, by phase."""
    frozen: Curves = field(default_factory=dict)
    """Number of parameters that may not, by phase."""
    metrics: Curves = field(default_factory=dict)
    """By name."""


def training_panel(
    rates: Sequence[float], dropped: Sequence[float], history: History, *, title: str = "Training"
) -> Image:
    """Draw drops by branch, gradient norm by phase, live and frozen parameters, and metrics over steps.

    Args:
        rates: Drop rate of each branch in the same time.
        dropped: Fraction of rows that were dropped, by branch.
        history: The curves.
        title: First line of the image.

    Returns:
        The image, `uint8[580, 700, 3]`.
    """
    with matplotlib.rc_context(_TEXT):
        figure = _figure(title)
        (drops, gradients), (parameters, metrics) = figure.subplots(2, 2)
        branches = np.arange(1, len(rates) + 1)
        drops.bar(branches, dropped, color=LINES[0], label="dropped")
        drops.step(branches, rates, where="mid", color=LINES[1], label="rate")
        drops.set(title="Rows dropped", xlabel="branch", ylim=(0, max(1.3 * max([*rates, *dropped]), 0.01)))
        drops.yaxis.set_major_formatter("{x:.0%}" if max([*rates, *dropped]) >= 0.05 else "{x:.1%}")
        drops.xaxis.set_major_locator(MaxNLocator(integer=True))
        drops.legend(edgecolor="none", framealpha=0.8, loc="upper left")
        _curves(gradients, history.gradient_norm)
        gradients.set(title="Gradient norm", xlabel="step", yscale="log")
        _curves(parameters, history.live)
        _curves(parameters, {f"_{phase}": curve for phase, curve in history.frozen.items()}, "--")
        parameters.set(title="Parameters: live, frozen (dashed)", xlabel="step", ylim=(0, None))
        _curves(metrics, history.metrics)
        metrics.set(title="Metrics", xlabel="step")
        for axes in (gradients, parameters, metrics):
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if axes.lines:
                axes.legend(edgecolor="none", framealpha=0.8)
        return _pixels(figure)


def _figure(title: str, height: float = 5.8) -> Figure:
    figure = Figure(figsize=(7, height), dpi=100)
    # Fixed margins: matplotlib's automatic layouts draw everything twice.
    margins = {"bottom": 0.6 / height, "top": 1 - 0.85 / height}
    figure.subplots_adjust(left=0.1, right=0.92, wspace=0.34, hspace=0.5, **margins)
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, y=1 - 0.12 / height, ha="left", va="top")
    return figure


def _curves(axes: Axes, curves: Curves, style: str = "-") -> None:
    for color, (label, curve) in zip(LINES, curves.items(), strict=False):
        steps, values = zip(*curve, strict=True)
        marker = "o" if len(steps) == 1 else ""
        axes.plot(steps, values, color=color, label=label, linestyle=style, marker=marker, linewidth=1.5)


def _heatmap(figure: Figure, axes: Axes, values: Any, title: str, highest: float | None) -> None:
    axes.set_facecolor(UNDEFINED)
    # From 0, so that the colour of a pair does not depend on the other pairs any more than it must.
    image = axes.imshow(values, cmap=MAGNITUDE, vmin=0, vmax=highest, interpolation="nearest")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(image, ax=axes, fraction=0.046)


def _reuse(features: Sequence[Tensor]) -> str:
    if len({values.shape for values in features}) == len(features):
        return ""  # no two layers can be compared
    score = feature_reuse(features)
    return f"reused {score.reused:.2f}, recreated {score.recreated:.2f}"


def _pixels(figure: Figure) -> Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: Image = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
    return pixels
