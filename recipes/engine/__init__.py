"""What the recipes share: configuration, processes, the training loop, checkpoints and records.

A recipe reads its command line, then makes its data and its model and hands them to `engine.train`; `engine.main` runs
it for each of its seeds. What stands here imports nothing that takes time, so that `--help` and mistakes in the command
line are answered at once.
"""

from __future__ import annotations

from engine.start import interruptible

with interruptible():
    from engine.command import command_line
    from engine.config import Config, parse
    from engine.errors import RunError, explained
    from engine.ranges import Range

__all__ = ["Config", "Range", "RunError", "command_line", "explained", "interruptible", "parse"]
