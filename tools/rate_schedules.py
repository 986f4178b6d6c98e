"""Draw the schedules of `rdp.rate_schedules`: the rate of a branch over optimizer steps.

    python tools/rate_schedules.py --out docs/images

It writes rate_schedules.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass(frozen=True)
class Arguments:
    """What to draw.

    Attributes:
        out: Folder of the picture.
    """

    out: Path = Path()


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Arguments, description=__doc__)


with interruptible():
    from matplotlib.figure import Figure

    from rdp.rate_schedules import early, late, linear, warmup

SCHEDULES = {
    "warmup(1000)": warmup(1000),
    "early(1000)": early(1000),
    "late(1000)": late(1000),
    "linear(1000, 3000)": linear(1000, 3000),
    "linear(3000, 0)": linear(3000, 0),
    "warmup(500) * early(3000)": warmup(500) * early(3000),
}
STEPS = 4000


def main(arguments: Arguments) -> Path:
    """Write the picture and return its path."""
    figure = Figure(figsize=(7, 3.4), dpi=100, layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, schedule) in zip(grid.flat, SCHEDULES.items(), strict=True):
        axes.step(range(0, STEPS, 2), [schedule(step) for step in range(0, STEPS, 2)], where="post")
        axes.set_title(name, fontsize=10)
        axes.set(ylim=(-0.08, 1.08), xticks=(0, 1000, 2000, 3000, 4000))
        axes.tick_params(labelsize=8)
    figure.supylabel("factor on the rate", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rate_schedules.png"
    figure.savefig(path)
    return path


if __name__ == "__main__":
    with explained():
        print(main(args))
