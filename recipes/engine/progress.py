"""A progress bar where somebody looks at it, a terminal or a notebook, and none in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import auto


class tqdm(auto.tqdm):  # type: ignore[misc, type-arg]
    """tqdm's, with another default: where `disable` is not given, only a terminal and a notebook have a bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        unwatched = False if "ipykernel" in sys.modules else None  # None: unless the output is a terminal
        super().__init__(*args, **{"disable": unwatched} | options)
