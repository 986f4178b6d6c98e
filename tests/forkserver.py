"""Processes for tests, forked from one server that has imported what takes seconds: they start in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext

PRELOADED = [
    "distributed.alone",
    "pytest",
    "tests.recipes.engine.tiny",
    "torch._dynamo",  # which the first optimizer step imports
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
"""For all tests: Python starts one server, with the list of whoever is the first."""


def context() -> ForkServerContext:
    """What starts them."""
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the server imports as pytest does
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOADED)
    return forkserver
