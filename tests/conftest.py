"""Hypothesis profiles, chosen by `HYPOTHESIS_PROFILE`; one thread per process; what coverage is measured on."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

common = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# The same examples in every run, so that a failure is a change of the code; `thorough` looks for new ones.
settings.register_profile("default", common, max_examples=100, derandomize=True)
settings.register_profile("quick", common, max_examples=25, derandomize=True)
settings.register_profile("thorough", common, max_examples=2000)
# For mutation testing, where a failing example need not be made smaller.
settings.register_profile("mutation", settings.get_profile("quick"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

TESTS = Path(__file__).parent
# Coverage makes Python 1.7 times as slow. These run the same lines often, as drawn laws do, or others than rdp's.
UNMEASURED = {"integrations", "recipes", "test_compile.py", "test_fuzz.py", "test_zoo.py", "tools"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    parts = set(item.path.relative_to(TESTS).parts)
    coverage = sys.modules.get("coverage")
    measured = coverage and coverage.Coverage.current()
    if not measured or not (UNMEASURED & parts or ("laws" in parts and item.get_closest_marker("hypothesis"))):
        return (yield)
    measured.stop()
    try:
        return (yield)
    finally:
        measured.start()


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: garbage is not looked for there."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries complain at the end of objects that are left."""
    gc.unfreeze()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, which no process of ours is
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the models of the laws are tiny: threads only cost
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, which are as many as there are workers or more


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `compute="auto"`, the tiny models of tests run on rows all the same, but for `test_too_small.py`."""
    monkeypatch.setattr("rdp.rows.plan.fewest_rows", lambda *_: 0)


@pytest.fixture(autouse=True)
def guards_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch times the guards of each graph over an emptied cache, for its logs: a seventh of the time of small ones."""
    if (guards := sys.modules.get("torch._dynamo.guards")) is not None:
        monkeypatch.setattr(guards, "profile_guard_manager", lambda *_: 0.0, raising=False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs of no other test, and counts from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
