from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have everything imported already: in milliseconds, so that they can be killed midway."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the server imports as pytest does
    context.set_forkserver_preload(["tests.recipes.engine.tiny"])
    return context
