"""Curves and heatmaps: how alike the layers are (the paper's Figure 3), and what branches are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rdp.analysis.lesions import Lesions
from rdp.analysis.reuse import feature_reuse
from rdp.analysis.similarity import cka_matrix, cosine_matrix, distance_matrix
from rdp.tensorboard.colors import LINES, MAGNITUDE, UNDEFINED, Image
from rdp.tensorboard.plots import figure, headed, pixels, style, whole_numbers


def similarity_panel(
    features: Sequence[Tensor], *, title: str = "How alike are the layers?", enters: str = "input"
) -> Image:
    """Draw each layer against the first (curves) and against each other layer (heatmaps).

    Args:
        features: What enters the first layer and N layers, each `Tensor[N, ...]`, as `extract_features` gives them.
        title: First line of the image.
        enters: What the first of them is: the network's input, or the output of its stem.

    Returns:
        The image, `uint8[1240, 1400, 3]`. On the left Euclidean distance, on the right linear CKA and cosine. Grey
        marks pairs that cannot be compared: distance and cosine need layers of equal shape.

    Raises:
        ArgumentError: As `distance_matrix` and `cka_matrix`.
    """
    distance = distance_matrix(features).numpy()
    cosine = cosine_matrix(features).numpy()
    cka = cka_matrix(features).numpy()
    layers = np.arange(len(features))
    with style():
        made = figure(f"{title}   {_reuse(features)}", height=6.2)
        (far, near), (distances, similarities) = made.subplots(2, 2, height_ratios=[2, 3])
        far.plot(layers, distance[0], color=LINES[0], marker="o", markersize=4)
        near.plot(layers, cka[0], color=LINES[0], marker="o", markersize=4, label="CKA")
        near.plot(layers, cosine[0], color=LINES[1], marker="s", markersize=4, linestyle="--", label="cosine")
        low = min(0.0, float(np.nanmin([cka[0], cosine[0]])))
        near.set(ylim=(low - 0.03, 1.05))
        far.set(ylim=(0, None))
        headed(far, f"Distance to the {enters}")
        headed(near, f"Similarity to the {enters}")
        _heatmap(made, distances, distance, "Distance of two layers", None)
        _heatmap(made, similarities, cka, "CKA of two layers", 1.0)
        for axes in (far, near):
            axes.set(xlim=(-0.3, len(layers) - 0.7))
        whole_numbers(far, near)
        for axes in (distances, similarities):
            axes.set_xlabel(f"layer (0: {enters})")
        distances.set_ylabel("layer")  # and of the other, which has no room for it
        if np.isnan(distance).any():
            distances.set_title("Distance (grey: shapes differ)")
        return pixels(made)


def comparison_panel(
    distances: Mapping[str, Tensor], similarities: Mapping[str, Tensor], *, title: str = "Layers against the input"
) -> Image:
    """Draw how far layers are from the input for several ways of training, with several runs of each.

    Args:
        distances: For each name, `Tensor[runs, L]`: Euclidean distance of each layer to the input.
        similarities: For each name, `Tensor[runs, L]`: linear CKA of each layer with the input.
        title: First line of the image.

    Returns:
        The image, `uint8[720, 1400, 3]`: means over runs, and bands from the lowest to the highest run.
    """
    with style():
        made = figure(title, height=3.6)
        far, near = made.subplots(1, 2)
        for axes, curves in ((far, distances), (near, similarities)):
            for color, marker, (name, runs) in zip(LINES, "os^v", curves.items(), strict=False):
                mean, low, high = runs.mean(dim=0).numpy(), runs.amin(dim=0).numpy(), runs.amax(dim=0).numpy()
                layers = np.arange(len(mean))
                every = max(len(mean) // 8, 1)
                axes.plot(layers, mean, color=color, marker=marker, markevery=every, markersize=5, label=name)
                axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set(xlabel="layer (0 is the input)", xlim=(0, len(layers) - 1))
        whole_numbers(far, near)
        far.set(yscale="symlog", ylim=(0, None))
        near.set(ylim=(-0.03, 1.03))
        headed(far, "Distance to the input")
        headed(near, "CKA with the input")
        return pixels(made)


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
        The image, `uint8[720, 1400, 3]`: means over runs; bands reach from the lowest to the highest one.
    """
    named = {"": results} if isinstance(results, Lesions) else results
    runs = {name: [each] if isinstance(each, Lesions) else list(each) for name, each in named.items()}
    with style():
        made = figure(title, height=3.6)
        bars, curves = made.subplots(1, 2)
        worth_bars(bars, runs)
        for color, (name, each) in zip(LINES, runs.items(), strict=False):
            count = len(each[0].table)
            ways = [
                (name or "worth least first", "-", [result.least for result in each]),
                ("_" if name else "at random", "--", [_means(result.random) for result in each]),
            ]
            for label, style_, by_number in ways:
                kept = [count - number for number in by_number[0]]
                values = np.array([list(one.values()) for one in by_number])
                if values.size:
                    curves.plot(kept, values.mean(0), style_, color=color, label=label, marker=".", linewidth=1.5)
                    curves.fill_between(kept, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
        curves.set(xlabel="branches kept", xlim=(count + 0.3, -0.3))
        whole_numbers(bars, curves)
        headed(bars, f"{metric} lost without it")
        headed(curves, f"{metric} left" + (" (dashed: at random)" if "" not in runs else ""))
        return pixels(made)


def worth_bars(axes: Axes, runs: Mapping[str, Sequence[Lesions]]) -> None:
    """What each branch is worth, the mean over runs, side by side for several names."""
    for place, (color, each) in enumerate(zip(LINES, runs.values(), strict=False)):
        worth = np.mean([[lesion.worth for lesion in result.table] for result in each], axis=0)
        width = 0.8 / len(runs)
        places = np.arange(len(worth)) + 1 + width * (place - (len(runs) - 1) / 2)
        axes.bar(places, worth, width, color=color)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="branch, in forward order")


def _means(drawn: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {number: float(np.mean(values)) for number, values in drawn.items()}


def _heatmap(made: Figure, axes: Axes, values: Any, title: str, highest: float | None) -> None:
    axes.set_facecolor(UNDEFINED)
    axes.grid(visible=False)
    # From 0, so that the colour of a pair does not depend on the other pairs any more than it must.
    image = axes.imshow(values, cmap=MAGNITUDE, vmin=0, vmax=highest, interpolation="nearest")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    made.colorbar(image, ax=axes, fraction=0.046)


def _reuse(features: Sequence[Tensor]) -> str:
    if len({values.shape for values in features}) == len(features):
        return ""  # no two layers can be compared
    score = feature_reuse(features)
    return f"reused {score.reused:.2f}, recreated {score.recreated:.2f}"
