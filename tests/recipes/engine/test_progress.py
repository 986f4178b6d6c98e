"""Bars are drawn where somebody looks, and a log file holds lines alone."""

from __future__ import annotations

import io
import sys
import types

import pytest
from engine.progress import tqdm


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("file", "drawn"), [(Terminal(), True), (io.StringIO(), False)])
def test_a_terminal_has_a_bar_and_a_file_has_none(file: io.StringIO, drawn: bool) -> None:
    assert list(tqdm(range(3), file=file, desc="here")) == [0, 1, 2]
    assert ("here" in file.getvalue()) == drawn
    assert (
        "here"
        in str(list(tqdm(range(3), file=(shown := io.StringIO()), desc="here", disable=False))) + shown.getvalue()
    )


def test_a_notebook_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    list(tqdm(range(3), file=(file := io.StringIO()), desc="here"))
    assert "here" in file.getvalue()
