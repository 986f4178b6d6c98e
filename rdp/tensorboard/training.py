"""How training goes: which branches learn from how many rows in each phase, loss, gradients, rates and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from rdp.analysis.lesions import Lesions
from rdp.phases import Phase
from rdp.tensorboard.charts import worth_bars
from rdp.tensorboard.colors import LINES, UNDEFINED, Image
from rdp.tensorboard.plots import figure, headed, logarithmic, pixels, short_numbers, style, whole_numbers

_SMOOTH = 20
"""A point of a smoothed curve is the mean over a tenth of the curve: this part of it to either side."""
_PALE = 0.4


@dataclass
class History:
    """The points of all charts, (step, value), by tag: "train/loss", "drop/loss", "test/top1" and so on."""

    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add points."""
        for tag, number in numbers.items():
            self.points.setdefault(tag, []).append((step, number))


class Learning:
    """Counts the rows that each branch learns from, by phase."""

    def __init__(self) -> None:
        self._sums: dict[Phase, Tensor] = {}
        self._rows: dict[Phase, int] = {}

    def step(self, phase: Phase, learns: Tensor, rates: Sequence[float]) -> None:
        """Count a step.

        Args:
            phase: Its phase.
            learns: bool `Tensor[branches, rows]`, on the CPU.
            rates: Of the branches, in its cycle; one of rate 0 learns from all rows in any phase.
        """
        rows, rate = learns.shape[1], torch.tensor(rates)
        expected = {Phase.DROP: 1 - rate, Phase.FREEZE: rate + (rate == 0), Phase.PLAIN: torch.ones(len(rates))}[phase]
        sums = torch.stack((learns.sum(dim=1), expected * rows), dim=1)
        self._sums[phase] = self._sums[phase] + sums if phase in self._sums else sums
        self._rows[phase] = self._rows.get(phase, 0) + rows

    def shares(self) -> dict[Phase, list[tuple[float, float]]]:
        """For each phase that was seen and each branch: the share of rows that it learnt from, and what it is to be."""
        shares = {phase: (sums / max(self._rows[phase], 1)).tolist() for phase, sums in self._sums.items()}
        return {phase: [(learnt, expected) for learnt, expected in each] for phase, each in shares.items()}


def training_panel(
    learning: Mapping[Phase, Sequence[tuple[float, float]]],
    history: History,
    *,
    title: str = "Training",
    lesions: Lesions | None = None,
) -> Image:
    """Draw what each phase teaches, the loss, gradients, drop rate, tests and, if there are any, lesions.

    Args:
        learning: For each phase and branch, the share of rows that it learns from, and the one that its rate gives;
            `Learning.shares` counts them.
        history: The curves. "train/loss" is drawn pale and smoothed, "drop/loss" and such beside it;
            "train/gradient_norm", "rdp/rate", and all of "test/".
        title: First line of the image.
        lesions: What `rdp.analysis.lesions` returned, if it was asked for.

    Returns:
        The image, `uint8[height, 1400, 3]`.
    """
    rows = 3 + (lesions is not None)
    with style():
        made = figure(title, height=0.6 + 2.7 * rows)
        grid = made.add_gridspec(rows, 1, hspace=0.62)
        phases = [phase for phase in Phase if phase in learning]
        first = grid[0].subgridspec(1, max(len(phases), 1), wspace=0.3)
        for place, phase in enumerate(phases):
            _learning(made.add_subplot(first[place]), phase, learning[phase])
        below = [grid[row].subgridspec(1, 2, wspace=0.3) for row in (1, 2)]
        cells = [made.add_subplot(each[place]) for each in below for place in (0, 1)]
        losses, gradients, rates, tests = cells
        points = history.points
        _losses(losses, points)
        _smoothed(gradients, points.get("train/gradient_norm", []), None)
        logarithmic(gradients)
        headed(gradients, "Gradient norm, mean over phases")
        _rate(rates, points.get("rdp/rate", []))
        _tests(tests, points)
        for axes in cells:
            axes.set(xlabel="step")
            if not axes.lines and not axes.texts:
                axes.text(0.5, 0.5, "no points yet", transform=axes.transAxes, ha="center", color="#777777")
        whole_numbers(*cells)
        if lesions is not None:
            axes = made.add_subplot(grid[3])
            worth_bars(axes, {"": [lesions]})
            whole_numbers(axes)
            headed(axes, "Lost without the branch")
        return pixels(made)


def _learning(axes: Axes, phase: Phase, shares: Sequence[tuple[float, float]]) -> None:
    branches = np.arange(1, len(shares) + 1)
    learnt, expected = np.array(shares).reshape(-1, 2).T
    always = expected >= 1
    top = 1.0 if phase is not Phase.FREEZE or always.all() else 1.3 * max(*learnt[~always], *expected[~always], 0.01)
    if always.any():
        name = "rate 0: all rows" if phase is not Phase.PLAIN else None
        axes.bar(branches[always], np.full(always.sum(), top), color=UNDEFINED, label=name)
    if not always.all():
        color = LINES[1] if phase is Phase.FREEZE else LINES[0]
        axes.bar(branches[~always], learnt[~always], color=color)
        low, high = branches[~always] - 0.45, branches[~always] + 0.45
        axes.hlines(expected[~always], low, high, color="black", linewidth=1.2, label="expected")
    axes.set(xlabel="branch", ylim=(0, top * 1.03))
    axes.yaxis.set_major_formatter(_percent)
    axes.grid(visible=False, axis="x")
    whole_numbers(axes)
    which = {Phase.DROP: "undropped rows", Phase.FREEZE: "dropped rows", Phase.PLAIN: "all rows"}[phase]
    headed(axes, f"{phase.name} teaches {which}")


def _percent(share: float, _: object) -> str:
    return f"{100 * share:.3g}%"


def _losses(axes: Axes, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for color, phase in zip(LINES, (Phase.DROP, Phase.FREEZE), strict=False):
        if curve := points.get(f"{phase.name.lower()}/loss"):
            axes.plot(*zip(*curve, strict=True), color=color, alpha=_PALE + 0.2, linewidth=0.9, label=phase.name)
    _smoothed(axes, points.get("train/loss", []), "all, smoothed" if axes.lines else "smoothed")
    if curve := points.get("test/loss"):
        axes.plot(*zip(*curve, strict=True), color=LINES[2], marker=".", linewidth=1, label="test")
    logarithmic(axes)
    headed(axes, "Loss")


def _smoothed(axes: Axes, curve: Sequence[tuple[int, float]], label: str | None) -> None:
    """A curve, pale, and over it means of its neighbouring points."""
    if not curve:
        return
    steps, values = zip(*curve, strict=True)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places, reach = np.arange(len(values)), max(len(values) // _SMOOTH, 1)
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    axes.plot(steps, values, color="#999999", alpha=_PALE, linewidth=0.8)
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, (sums[high] - sums[low]) / (high - low), color="black", linewidth=1.6, label=label, marker=marker)


def _rate(axes: Axes, curve: Sequence[tuple[int, float]]) -> None:
    if curve and not any(value for _, value in curve):
        axes.text(0.5, 0.5, "0: nothing is dropped", transform=axes.transAxes, ha="center", color="#777777")
        axes.set(yticks=[], xticks=[])
    elif curve:
        axes.step(*zip(*curve, strict=True), where="post", color=LINES[0], marker="o" if len(curve) == 1 else "")
        axes.set(ylim=(0, 1.2 * max(value for _, value in curve)))
        axes.yaxis.set_major_formatter(_percent)
    headed(axes, "Drop rate of the deepest branch")


def _tests(axes: Axes, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    curves = {tag.removeprefix("test/"): curve for tag, curve in points.items() if tag.startswith("test/")}
    curves.pop("loss", None)
    for color, (name, curve) in zip(LINES, curves.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=color, marker=".", linewidth=1.5, label=name)
    short_numbers(axes)
    headed(axes, "Test")
