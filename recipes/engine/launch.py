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
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from data.lifetime import die_with
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args as torchrun_args
from torch.distributed.run import run as torchrun

from engine.config import Config
from engine.errors import LAUNCHED, RunError

_GIVEN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, to each process
_PEER_LOST = "another process of this run has ended"


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
        RunError: there are fewer devices than asked for, or they cannot share the batch equally; or the environment is
            not one that torchrun makes.
    """
    if "WORLD_SIZE" in os.environ:
        config.micro_batch(_check_environment(config))
        _die_with_launcher()
        return
    devices = _count(config)
    config.micro_batch(devices)
    if devices == 1:
        return
    os.environ[LAUNCHED] = str(os.getpid())
    # torchrun passes on the other signals that ask for a stop; not in every version this one, which is Slurm's.
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one sentence
    arguments = torchrun_args(["--standalone", f"--nproc-per-node={devices}", *sys.argv])
    try:
        torchrun(arguments)
    except ChildFailedError as failed:
        first = min(failed.failures.values(), key=_lateness)
        print(f"error: {_sentence(first.message, first.exitcode)}", file=sys.stderr, flush=True)
        raise SystemExit(max(1, first.exitcode)) from None
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

    Raises:
        RunError: another process ended.
    """
    kind = _kind(config)
    if "WORLD_SIZE" not in os.environ:
        yield World(torch.device(kind))
        return
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # The CPU's half carries the few numbers that processes agree on without waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        yield World(device, dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        # What killed the other is told by it, or by whoever started both.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RunError(f"{_PEER_LOST}; what was saved is untouched: go on with --resume") from error
        raise
    # Not after an error: it would wait for what the others do not send any more, and tell them before we have said why.
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


def _check_environment(config: Config) -> int:
    missing = [name for name in _GIVEN if not os.environ.get(name)]
    if missing:
        raise RunError(
            f"WORLD_SIZE is set and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: start the run "
            "with torchrun, or unset WORLD_SIZE"
        )
    numbers = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    for name, value in numbers.items():
        if not (value.isascii() and value.isdigit()):
            raise RunError(f"{name} must be a number, not {value!r}: start the run with torchrun, or unset WORLD_SIZE")
    size, here = int(numbers["WORLD_SIZE"]), os.environ.get("LOCAL_WORLD_SIZE", "")
    if int(numbers["RANK"]) >= size:
        raise RunError(f"RANK {numbers['RANK']} is not below WORLD_SIZE {size}: start the run with torchrun")
    if config.devices not in (0, 1, size) and str(config.devices) != here:
        raise RunError(
            f"--devices {config.devices}, but torchrun has started {size} {'process' if size == 1 else 'processes'}: "
            f"give torchrun --nproc-per-node {config.devices}, and leave --devices out"
        )
    return size


def _die_with_launcher() -> None:
    # Processes that train on alone keep the folder and the devices from the run that is to go on with --resume.
    if LAUNCHED in os.environ:
        die_with(int(os.environ[LAUNCHED]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, of whom we know that it starts us from its main thread
        die_with(os.getppid())


def _lateness(failure: ProcessFailure) -> tuple[int, int]:
    # Which failure is the cause of the others? All fall into one second, the unit of the times, so by their kind.
    told = os.path.isfile(failure.error_file)
    if failure.exitcode == -signal.SIGTERM:  # by torchrun, to whoever is left
        kind = 3
    elif told and _sentence(failure.message, failure.exitcode).startswith(_PEER_LOST):
        kind = 2
    else:
        kind = 0 if told else 1
    return kind, failure.timestamp


def _sentence(message: object, exitcode: int) -> str:
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        cause = ", as the system does when memory runs out" if -exitcode == signal.SIGKILL else ""
        return f"a process of the run was killed ({name}{cause}); what was saved is untouched: go on with --resume"
    # A worker's error file nests {"message": {"message": "RunError: ...", ...}}; others have plain text.
    while isinstance(message, dict) or (isinstance(message, str) and message.startswith("{")):
        message = json.loads(message) if isinstance(message, str) else message.get("message", "")
    if not message or str(message).startswith("To enable traceback"):  # torch's words: the traceback is there already
        return f"a process ended with exit status {exitcode}"
    return str(message).removeprefix("RunError: ")
