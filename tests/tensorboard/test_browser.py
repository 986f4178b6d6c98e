"""TensorBoard in a browser: every tab opens without an error, and the panels and charts are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import RUNS, tensorboard

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("RDP_SCREENSHOTS")
"""A folder for pictures of what is seen, to look at."""


@pytest.fixture(scope="module")
def address(spiral_runs: Path) -> Iterator[str]:
    with tensorboard(spiral_runs / "0") as address:  # as it is by default
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("scale", "scheme"), [(1, "light"), (2, "dark")])
def test_every_tab_opens_without_an_error(browser: Any, address: str, scale: int, scheme: str) -> None:
    page = browser.new_page(device_scale_factor=scale, color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    seen = {
        "timeseries": "drop/loss",
        "custom_scalars": "Learning",
        "images": "features/nodes",
        "hparams": "test/top1",
        "text": "settings",
    }
    for tab, text in seen.items():
        page.goto(f"{address}{'?darkMode=true' if scheme == 'dark' else ''}#{tab}")
        page.get_by_text(text).first.wait_for(timeout=120_000, state="attached")
        page.wait_for_timeout(2000)
        if SCREENSHOTS:
            page.screenshot(path=str(Path(SCREENSHOTS, f"{tab}-{scale}x-{scheme}.png")))
        if tab == "images":
            for run in RUNS:
                page.get_by_text(run).first.wait_for(state="attached")
            loaded = "[...document.querySelectorAll('img')].filter(i => i.naturalWidth > 300).length"
            deep = loaded.replace("document.querySelectorAll('img')", "all(document)")
            find = """const all = root => [...root.querySelectorAll('*')].flatMap(
                e => [...(e.tagName === 'IMG' ? [e] : []), ...(e.shadowRoot ? all(e.shadowRoot) : [])]);"""
            page.wait_for_function(f"() => {{ {find} return {deep} >= 3; }}", timeout=60_000)
    assert not errors
    page.close()
