"""Messages of recipes: lines of stdout that `logging` can silence and take."""

from __future__ import annotations

import logging

import pytest
from engine.messages import log


def test_a_message_is_a_line_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("%d images", 3)
    assert capsys.readouterr() == ("3 images\n", "")


def test_logging_silences_all_but_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("recipes").setLevel(logging.WARNING)
    try:
        log.info("3 images")
        log.warning("cannot write")
    finally:
        log.setLevel(logging.INFO)
    assert capsys.readouterr().out == "cannot write\n"
