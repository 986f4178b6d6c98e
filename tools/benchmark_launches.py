"""How many kernels a branch launches more than in plain training, counted on a simulated device: nothing is timed.

    python tools/benchmark_launches.py                      # a minute
    python tools/benchmark_launches.py --models vit swin

Forward and backward of one training step, for each branch, in DROP and FREEZE. Less than zero is saved. The same
numbers are a budget that the tests hold (`tests/device/on_launches.py`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass
class Args:
    """Options."""

    models: tuple[str, ...] = ()
    """Tiny ones of these kinds; all, if there are none."""


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import torch
    from device.launches import WAYS, added
    from device.programs import MODELS
    from device.simulated import is_supported


def main(args: Args) -> None:
    """Count and print."""
    warnings.simplefilter("ignore")
    if unknown := set(args.models) - MODELS.keys():
        raise SystemExit(f"no model is called {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if not is_supported():
        raise SystemExit(f"torch {torch.__version__} has no backends that are written in Python; take a newer one")
    print(f"torch {torch.__version__}, launches that a branch adds, DROP / FREEZE\n")
    print(f"| model | {' | '.join(WAYS)} |")
    print(f"|---|{'---:|' * len(WAYS)}")
    for name in args.models or MODELS:
        cells = ["{:+.1f} / {:+.1f}".format(*added(name, way)) for way in WAYS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with explained(less="choose fewer --models"):
        main(args)
