"""The examples are scripts beside each other, so their folder has to be on the path."""

import sys
from pathlib import Path

import pytest
from recorder import Recorder

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "integrations"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch):
    """Watches what an example does, without the example's help."""
    with Recorder(monkeypatch) as recorder:
        yield recorder
