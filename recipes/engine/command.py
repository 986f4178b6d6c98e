"""The command line of a file that is run, read before the file imports what takes seconds.

if __name__ == "__main__":
    config = command_line(configure)

with interruptible():
    import torch
...
if __name__ == "__main__":
    main(config, run)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from engine.errors import explained
from engine.output import best_effort_output
from engine.start import interruptible

Given = ParamSpec("Given")
T = TypeVar("T")


def command_line(configure: Callable[[list[str]], T]) -> T:
    """What `configure` makes of the command line.

    Raises:
        SystemExit: `--help` was answered, or something is wrong, which was said in one sentence.
    """
    with best_effort_output(), explained(), interruptible():
        return configure(sys.argv[1:])


def later(function: Callable[Given, T]) -> Callable[Given, Callable[[], T]]:
    """A function whose arguments are read now, as `tyro.cli` does, and which runs when what that returns is called."""

    @functools.wraps(function)
    def arguments(*args: Given.args, **kwargs: Given.kwargs) -> Callable[[], T]:
        return functools.partial(function, *args, **kwargs)

    return arguments
