"""What the recipes share: configuration, processes, the training loop, checkpoints and records.

A recipe makes its data and its model and hands them to `train`; `main` runs a recipe for each of its seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.start import interruptible

with interruptible():
    from engine.config import Config, ConfigT, parse
    from engine.errors import RunError, explained
    from engine.folder import is_finished, seed_folder
    from engine.launch import World, join, launch
    from engine.loaders import open_loaders
    from engine.model import make_model
    from engine.output import best_effort_output
    from engine.ranges import Range
    from engine.rng import seed_all
    from engine.train import train

__all__ = [
    "Config",
    "Range",
    "RunError",
    "World",
    "join",
    "launch",
    "main",
    "make_model",
    "open_loaders",
    "parse",
    "train",
]


def main(configure: Callable[[list[str]], ConfigT], run: Callable[[ConfigT, int, World], None]) -> None:
    """Run a recipe from the command line: every seed in turn, in one process per device.

    Args:
        configure: makes the configuration from the command line.
        run: trains one seed.

    Raises:
        SystemExit: with status 1 and one sentence if something is wrong that the user can put right.
    """
    with best_effort_output(), explained():
        config = configure(sys.argv[1:])
        launch(config)
        with join(config) as world:
            if world.is_first:
                print(f"{config.describe()}\nreading the data", flush=True)
            for seed in range(config.seed, config.seed + config.seeds):
                if world.highest(world.is_first and is_finished(config, seed)):
                    if world.is_first:
                        print(f"{seed_folder(config, seed)} is finished: nothing to do", flush=True)
                    continue
                seed_all(seed)
                run(config, seed, world)
