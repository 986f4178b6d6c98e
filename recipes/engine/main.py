"""A recipe from its settings to its results: every seed in turn, in one process per device."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import ConfigT
from engine.errors import explained
from engine.folder import is_finished, seed_folder
from engine.launch import World, join, launch
from engine.messages import log
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
                log.info("%s\nreading the data", config.describe())
            for seed in range(config.seed, config.seed + config.seeds):
                if world.highest(world.is_first and is_finished(config, seed)):
                    if world.is_first:
                        log.info("%s is finished: nothing to do", seed_folder(config, seed))
                    continue
                seed_all(seed)
                run(config, seed, world)
