"""What a recipe says while it runs: through `logging`, a line each, above a progress bar if there is one.

`logging.getLogger("recipes").setLevel(logging.WARNING)` leaves only what is wrong.
"""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class _AboveBars(logging.Handler):
    """To what is stdout at the time, which a run replaces by one that cannot fail."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()


log = logging.getLogger("recipes")
log.setLevel(logging.INFO)
log.addHandler(_AboveBars())
log.propagate = False  # a handler of the user's root logger would say it again
