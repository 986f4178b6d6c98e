from __future__ import annotations

from multiprocessing.context import ForkServerContext

import forkserver
import pytest


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have everything imported already: in milliseconds, so that they can be killed midway."""
    return forkserver.context()
