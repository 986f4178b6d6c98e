"""A recipe from its settings to its results: every seed in turn, in one process per device."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import ConfigT
from engine.errors import explained
from engine.folder import is_finished, seed_folder
from engine.launch import World, join, launch
from engine.output import best_effort_output
from engine.rng import seed_all


def main(config: ConfigT, run: Callable[[ConfigT, int, World], None]) -> None:
    """Run a recipe.

    Args:
        config: what the command line says, by `command_line`; other processes are started with the same one.
        run: trains one seed.

    Raises:
        SystemExit: with status 1 and one sentence if something is wrong that the user can put right.
    """
    with best_effort_output(), explained():
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
