"""What to do with the tests of FFCV where it is not installed."""

import os

import pytest
from data.ffcv_loader import APT_PACKAGES, ffcv_is_installed

REASON = f"FFCV is not installed (bash tools/install_ffcv.sh; it needs {APT_PACKAGES})"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ffcv: runs the real FFCV; skipped without it, or fails with RDP_REQUIRE_FFCV=1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ffcv") and not ffcv_is_installed():
        if os.environ.get("RDP_REQUIRE_FFCV") == "1":
            pytest.fail(f"RDP_REQUIRE_FFCV=1 and {REASON}", pytrace=False)
        pytest.skip(REASON)
