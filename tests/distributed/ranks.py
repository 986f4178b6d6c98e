"""Running a function in several CPU processes that form one gloo group."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forkserver
import torch
import torch.distributed as dist
import torch.multiprocessing

SILENCE = datetime.timedelta(seconds=20)
"""How long a rank waits for another; the others' part of a collective takes milliseconds."""


def run(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `function(*args)` in `ranks` processes; what each of them returned.

    Args:
        function: Defined at the top of a module; it finds its rank with `dist.get_rank()`.
        ranks: How many processes.
        args: Pickled into each of them.
        timeout: In seconds, for all of it.

    Raises:
        torch.multiprocessing.ProcessRaisedException: With the traceback of the first rank that raised.
        AssertionError: If a rank hangs.
    """
    forkserver.context()
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.start_processes(
            _rank, (ranks, folder, function, args), ranks, join=False, start_method="forkserver"
        )
        assert processes is not None
        end = time.monotonic() + timeout
        try:
            while not processes.join(max(end - time.monotonic(), 0)):
                assert time.monotonic() < end, f"{function.__name__} hangs"
        finally:
            for process in processes.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", SILENCE, world_size=ranks, rank=rank)
    result = function(*args)
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
