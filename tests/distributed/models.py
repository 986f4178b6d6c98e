"""What is trained: small models with an oracle, their optimizers, and the ways to wrap them for several ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from laws import architectures
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the rows of all ranks. `nn.SyncBatchNorm`, which is this, refuses to run on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        rows = x.transpose(0, 1).flatten(1)
        sums = torch.stack((rows.sum(1), rows.square().sum(1), torch.full_like(rows[:, 0], rows.shape[1])))
        total, squares, count = all_reduce(sums)
        mean, variance = total / count, squares / count - (total / count).square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normal = (rows - mean[:, None]) / (variance[:, None] + self.eps).sqrt()
        return (normal * self.weight[:, None] + self.bias[:, None]).unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)


def _shared_resnet() -> architectures.Architecture:
    model = architectures.ConvNet("basic", (1, 1, 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm
    return model


MODELS: dict[str, Callable[[], architectures.Architecture]] = {
    "mlp": lambda: architectures.BlockMLP(("norm", "plain", "layer_scale", "norm")),
    "transformer": lambda: architectures.Transformer("pre_norm", 2),
    "resnet": lambda: architectures.ConvNet("basic", (1, 1, 2)),
    "shared_resnet": _shared_resnet,
}

OPTIMIZERS: dict[str, functools.partial[torch.optim.Optimizer]] = {
    "plain_sgd": functools.partial(torch.optim.SGD, lr=0.05, weight_decay=1e-2),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def _with_hook(model: nn.Module, state: Any, hook: Callable[..., Any]) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(state, hook)
    return wrapped


def _power_sgd(model: nn.Module) -> DistributedDataParallel:
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=4, min_compression_rate=0
    )
    return _with_hook(model, state, powerSGD_hook.powerSGD_hook)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "default": DistributedDataParallel,
    "static_graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "gradient_as_bucket_view": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "find_unused_parameters": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "many_buckets": lambda model: DistributedDataParallel(model, bucket_cap_mb=1e-4),
    "fp16_compress": lambda model: _with_hook(model, None, default_hooks.fp16_compress_hook),
    "bf16_compress": lambda model: _with_hook(model, None, default_hooks.bf16_compress_hook),
    "power_sgd": _power_sgd,
}
