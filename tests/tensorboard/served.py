"""TensorBoard itself."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

RUNS = ["droppath", "rdp", "standard"]


@contextlib.contextmanager
def tensorboard(folder: Path, *options: str) -> Iterator[str]:
    """Serve a folder on a free port and yield the address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as server:
        stop = threading.Timer(120, server.kill)  # or the next line would wait for ever
        stop.start()
        try:
            assert server.stderr is not None
            said = []
            for line in server.stderr:
                said.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    stop.cancel()
                    yield found[0]
                    return
            raise AssertionError(f"TensorBoard did not start: {''.join(said)}")
        finally:
            stop.cancel()
            server.kill()
