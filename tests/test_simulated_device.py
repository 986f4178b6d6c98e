"""What training on an accelerator asks of it, on a simulated one, which is for a whole process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device import simulated


@pytest.mark.skipif(
    not simulated.is_supported(), reason=f"torch {torch.__version__} has no backends that are written in Python"
)
def test_in_a_process_of_its_own() -> None:
    files = [str(Path(__file__).parent / "device" / f"on_{part}.py") for part in ("equipment", "launches", "steps")]
    options = ["-n", "0", "-q", "--no-cov", "-p", "no:cacheprovider"]
    run = subprocess.run([sys.executable, "-m", "pytest", *files, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
