"""Everything that a run must remember to go on bit-exactly: what goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import rdp
from engine.errors import RunError
from engine.launch import World
from engine.rng import check_rng_state, get_rng_state, set_rng_state
from engine.validate import (
    require,
    require_count,
    require_finite,
    require_keys,
    require_like,
    require_optimizer,
    try_optimizer,
)

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


@dataclass
class TrainState:
    """The parts of a run that change while it trains.

    The learning rate and the data are not among them: they are pure functions of the position.
    """

    model: nn.Module  # not the DistributedDataParallel around it
    optimizer: torch.optim.Optimizer  # not the MaskedOptimizer around it, which shares its state
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    handle: rdp.ResidualDropPath | None
    world: World
    sharded: bool
    epoch: int = 0
    step: int = 0  # optimizer steps done in this epoch
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # of this process and epoch
    epoch_seconds: float = 0.0  # spent training in this epoch
    seconds: float = 0.0  # spent training in the epochs before

    def next_epoch(self) -> None:
        """Stand at the start of the next epoch."""
        self.seconds += self.epoch_seconds
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.loss_sum = torch.zeros_like(self.loss_sum)

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint's content. Every process must call it; the first one's result is the one to save.

        Raises:
            RunError: the processes' parameters have come to differ.
        """
        own = {
            "rng": get_rng_state(),
            "loss_sum": self.loss_sum.cpu(),
            "handle": self.handle.state_dict() if self.handle else None,
            "parameters": None if self.sharded else fingerprint(self.model),
        }
        processes = self.world.gather(own)
        if len({process["parameters"] for process in processes}) > 1:
            raise RunError(
                f"the {self.world.size} processes have come to have different parameters in epoch {self.epoch + 1}: "
                "this is a bug; the checkpoints before it are good"
            )
        if self.sharded:
            model = get_model_state_dict(self.model, options=_FULL)
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FULL)
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "processes": processes,
            "epoch": self.epoch,
            "step": self.step,
            "epoch_seconds": self.epoch_seconds,
            "seconds": self.seconds,
        }

    def check(self, state: dict[str, Any], *, epochs: int, steps: int) -> None:
        """Look at all of a checkpoint before anything is loaded; call it before the first step.

        Args:
            state: of `state_dict`, and whatever else.
            epochs: of the whole run.
            steps: optimizer steps in an epoch.

        Raises:
            ValueError: it is no state of this run; the message names what is wrong.
            RunError: it was written by another number of processes, which would get other images and random numbers.
        """
        processes = state["processes"]
        require(isinstance(processes, list) and len(processes) > 0, "processes", processes)
        if len(processes) != self.world.size:
            raise RunError(
                f"the checkpoint is of {len(processes)} processes and this run has {self.world.size}: "
                "resume on as many devices"
            )
        require_count(state["epoch"], epochs, "epoch")
        require_count(state["step"], 0 if state["epoch"] == epochs else steps, "step")
        for name in ("epoch_seconds", "seconds"):
            require_finite(state[name], name, least=0)
        require_like(state["model"], self.model.state_dict(), "model")
        require_like(state["ema"], self.ema.state_dict() if self.ema else None, "ema")
        require_like(state["scaler"], self.scaler.state_dict(), "scaler")
        for name, value in state["scaler"].items():
            require_finite(value, f"scaler.{name}", least=0 if name == "_growth_tracker" else 1e-30)
        if self.sharded:
            names: list[Any] = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            require_optimizer(state["optimizer"], self.optimizer, names)
        else:
            names = list(range(sum(len(group["params"]) for group in self.optimizer.param_groups)))
            require_optimizer(state["optimizer"], self.optimizer, names)
            try_optimizer(state["optimizer"], self.optimizer)
        for rank, own in enumerate(processes):
            require_keys(own, ("rng", "loss_sum", "handle", "parameters"), f"processes[{rank}]")
            require_like(own["loss_sum"], torch.zeros((), dtype=torch.float64), f"processes[{rank}].loss_sum")
            require_finite(float(own["loss_sum"]), f"processes[{rank}].loss_sum")
            require((own["handle"] is None) == (self.handle is None), f"processes[{rank}].handle", own["handle"])
        own = processes[self.world.rank]
        require_keys(own["rng"], ("torch", "cuda", "python", "numpy"), "random state")
        check_rng_state(own["rng"])
        if self.handle:
            try:
                self.handle.load_state_dict(own["handle"])  # which checks all of it before it changes anything
            except rdp.RdpError as error:
                raise ValueError(str(error)) from error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the checkpoint was written.

        Args:
            state: of `state_dict`, and checked; with FSDP only the first process's tensors are read.
        """
        if self.sharded:
            set_model_state_dict(self.model, state["model"], options=_FROM_FIRST)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=_FROM_FIRST)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        own = state["processes"][self.world.rank]
        if self.handle:
            self.handle.load_state_dict(own["handle"])
        self.loss_sum = own["loss_sum"].to(self.loss_sum.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.epoch_seconds, self.seconds = state["epoch_seconds"], state["seconds"]
        set_rng_state(own["rng"])


def fingerprint(model: nn.Module) -> str:
    """A digest of the bits of all parameters: equal exactly if replicas are."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
