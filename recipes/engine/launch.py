"""One process per device: starting them, and what each one knows about the others.

    config = parse(MyConfig, sys.argv[1:])
    launch(config)                     # with several devices: starts this script once for each, waits, exits
    with join(config) as world: ...    # in each process

Under `torchrun` the processes are there already and `launch` only checks the batch. It is torchrun itself that
`launch` runs, so both ways are the same.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args as torchrun_args
from torch.distributed.run import run as torchrun

from engine.config import Config
from engine.errors import LAUNCHED, RunError


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def highest(self, value: int) -> int:
        """The highest of the processes' values; on the CPU, so the GPU's queue is not waited for."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' tensors."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor


def launch(config: Config) -> None:
    """Run this script once for each device, if there is more than one and it is not running under torchrun already.

    Args:
        config: `devices` and `device` decide how many.

    Raises:
        RunError: there are fewer devices than asked for, or they cannot share the batch equally.
    """
    if "WORLD_SIZE" in os.environ:
        config.micro_batch(int(os.environ["WORLD_SIZE"]))
        return
    devices = _count(config)
    config.micro_batch(devices)
    if devices == 1:
        return
    os.environ[LAUNCHED] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one sentence
    arguments = torchrun_args(["--standalone", f"--nproc-per-node={devices}", *sys.argv])
    try:
        torchrun(arguments)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        print(f"error: {_sentence(failure.message, failure.exitcode)}", file=sys.stderr, flush=True)
        raise SystemExit(max(1, failure.exitcode)) from None
    except SignalException as signalled:
        raise SystemExit(128 + int(signalled.sigval)) from None
    raise SystemExit(0)


@contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the processes that `launch` or torchrun started; alone if there are none.

    Args:
        config: `device` decides between CPU (gloo) and GPU (NCCL).

    Yields:
        This process's device, rank and the number of processes.
    """
    kind = _kind(config)
    if "WORLD_SIZE" not in os.environ:
        yield World(torch.device(kind))
        return
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The CPU's half carries the few numbers that processes agree on without waiting for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _kind(config: Config) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda, but torch sees no GPU: check the driver, or use --device cpu")
    return config.device


def _count(config: Config) -> int:
    if _kind(config) == "cpu":
        return max(1, config.devices)
    visible = torch.cuda.device_count()
    if config.devices > visible:
        raise RunError(f"--devices {config.devices}, but torch sees {visible} GPUs")
    return config.devices or visible


def _sentence(message: object, exitcode: int) -> str:
    # A worker's error file nests {"message": {"message": "RunError: ...", ...}}; a killed worker has plain text.
    while isinstance(message, dict) or (isinstance(message, str) and message.startswith("{")):
        message = json.loads(message) if isinstance(message, str) else message.get("message", "")
    return str(message or f"a process ended with exit status {exitcode}").removeprefix("RunError: ")
