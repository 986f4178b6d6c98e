"""What all charts share: a figure, its margins and letters, legends that hide no curve, and its pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from rdp.tensorboard.colors import Image

DPI = 200
"""Pixels an inch: two a point of a screen of 100, so that charts are sharp on a screen that has them."""

_RANGE = 3
"""Of the largest and the smallest, above which a scale is logarithmic: at least two of its ticks are within."""

_TEXT: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@contextmanager
def style() -> Iterator[None]:
    """Letters and lines of all charts; matplotlib's own settings are afterwards as before."""
    with matplotlib.rc_context(_TEXT):
        yield


def figure(title: str, height: float = 5.8) -> Figure:
    """A figure 7 inches wide with a bold first line."""
    made = Figure(figsize=(7, height), dpi=DPI)
    # Fixed margins: matplotlib's automatic layouts draw everything twice.
    margins = {"bottom": 0.6 / height, "top": 1 - 1.0 / height}
    made.subplots_adjust(left=0.1, right=0.93, wspace=0.34, hspace=0.52, **margins)
    made.suptitle(title, fontsize=14, fontweight="bold", x=0.01, y=1 - 0.12 / height, ha="left", va="top")
    return made


def headed(axes: Axes, title: str) -> None:
    """Write a title, and the legend, if curves have names, between it and the axes, where it hides none of them."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=len(handles),
            borderaxespad=0.1,
            borderpad=0,
            handlelength=1.9,
            handletextpad=0.4,
            columnspacing=1.0,
        )
    axes.set_title(title, pad=20 if handles else 6)


def whole_numbers(*several: Axes) -> None:
    """Few ticks below, at whole numbers: steps, layers and branches have no others."""
    for axes in several:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def short_numbers(axes: Axes) -> None:
    """Numbers beside the axes that have room there, whatever they are."""
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.4g}" if abs(x) < 1e4 else EngFormatter(sep="")(x))


def logarithmic(axes: Axes) -> None:
    """Draw what is there on a logarithmic scale, if it is positive and covers a range; numbers are short anyway."""
    values = np.array([value for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() >= _RANGE * values.min():
        axes.set(yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    short_numbers(axes)  # last, as a scale brings formats of its own


def pixels(made: Figure) -> Image:
    """The figure as an image."""
    canvas = FigureCanvasAgg(made)
    canvas.draw()  # type: ignore[no-untyped-call]
    found: Image = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
    return found
