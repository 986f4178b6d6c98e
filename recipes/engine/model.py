"""The model of a run, the algorithm attached to it, and its optimizer."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rdp
from engine.config import Config
from engine.errors import RunError
from engine.launch import World


def make_model(config: Config, *, classes: int, channels: int) -> nn.Module:
    """Build a timm model with fresh weights.

    Args:
        config: `model`, `model_kwargs`, `small_stem` and `stem_stride`.
        classes: outputs of the head.
        channels: of the images.

    Returns:
        The model, on the CPU.

    Raises:
        RunError: timm has no such model, it does not take these arguments, or has no stem that could be made small.
    """
    if config.model not in timm.list_models():
        near = " or ".join(get_close_matches(config.model, timm.list_models()))
        raise RunError(
            f"timm has no model {config.model!r}: " + (f"do you mean {near}?" if near else "see timm.list_models()")
        )
    arguments = parse_arguments(config.model_kwargs)
    try:
        model = timm.create_model(config.model, num_classes=classes, in_chans=channels, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise RunError(f"timm's {config.model} cannot be built with --model-kwargs {arguments}: {error}") from error
    return shrink_stem(model, config.model, config.stem_stride) if config.small_stem else model


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Read "NAME=VALUE" as Python literals, or as text where VALUE is none.

    Raises:
        RunError: there is no "=" in one of them.
    """
    arguments: dict[str, Any] = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise RunError(f"--model-kwargs takes NAME=VALUE, such as embed_dim=96, not {argument!r}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


@torch.no_grad()
def check_model(model: nn.Module, images: torch.Tensor, name: str) -> None:
    """Try a model on real images before anything else is done with it.

    Args:
        model: plain; left as it was.
        images: `Tensor[N, C, H, W]`.
        name: of the model, for the error.

    Raises:
        RunError: the model does not take images of this size.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise RunError(f"{name} cannot take images of {size}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def shrink_stem(model: nn.Module, name: str, stride: int = 1) -> nn.Module:
    """Give a ResNet a 3x3 stem without pooling, so that small images stay 4 times larger inside, or 2 at stride 2.

    Args:
        model: a timm ResNet; changed in place.
        name: its name, for the error.
        stride: of the stem.

    Returns:
        The model.

    Raises:
        RunError: the model has no ResNet stem (`conv1` and `maxpool`).
    """
    stem, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    first = stem[0] if isinstance(stem, nn.Sequential) else stem
    if not isinstance(first, nn.Conv2d) or pool is None:
        raise RunError(f"--small-stem is for ResNets: {name} has no conv1 and maxpool")
    if isinstance(stem, nn.Sequential):  # resnet50d: three convolutions, the first of stride 2
        first.stride = (stride, stride)
    else:
        model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's other kernels
    model.maxpool = nn.Identity()
    return model


def attach(
    model: nn.Module, config: Config, *, seed: int, example: torch.Tensor | None = None, steps: int | None = None
) -> rdp.ResidualDropPath | None:
    """Attach the algorithm to a model.

    Args:
        model: plain.
        config: `algorithm` and the settings named as the arguments of `rdp.attach`.
        seed: of the masks.
        example: images to find the residual branches with; default: the first training batch.
        steps: of the whole training, of which `start` and `stop` are shares; default: the algorithm is always on.

    Returns:
        The handle; None for "standard", where nothing is attached unless there are panels to draw: a handle of rate 0
        shows them and changes nothing.

    Raises:
        RunError: there is no step between `start` and `stop`.
    """
    if config.algorithm == "standard":
        phases = (rdp.Phase.PLAIN,)
        return rdp.attach(model, 0.0, phases=phases, seed=seed, example_inputs=example) if config.panels else None
    scaled = config.algorithm == "droppath"
    return rdp.attach(
        model,
        config.rate,
        rate_schedule=None if steps is None else _rate_schedule(config, steps),
        mode=config.mode,
        decay=config.decay,
        sampling=config.sampling,
        freeze=config.freeze,
        scale_by_keep=scaled,
        phases=(rdp.Phase.DROP,) if scaled else tuple(map(rdp.Phase, config.phases)),
        compute=config.compute,
        seed=seed,
        example_inputs=example,
    )


def _rate_schedule(config: Config, steps: int) -> rdp.rate_schedules.RateSchedule | None:
    begin, end = round(config.start * steps), round(config.stop * steps)
    if begin >= end:
        raise RunError(f"--start {config.start:g} and --stop {config.stop:g} leave none of the {steps} steps between")
    if config.rate_schedule == "rising":
        return rdp.rate_schedules.linear(begin, end)
    if config.rate_schedule == "falling":
        return rdp.rate_schedules.linear(end, begin)
    always = (begin, end) == (0, steps)
    return None if always else rdp.rate_schedules.late(begin) * rdp.rate_schedules.early(end)


def distribute(model: nn.Module, config: Config, world: World) -> nn.Module:
    """Let the processes train one model together: DistributedDataParallel with its defaults, or FSDP2.

    Args:
        model: on this process's device, the algorithm attached.
        config: `fsdp`.
        world: the processes.

    Returns:
        What to call in training; the model itself when there is one process.

    Raises:
        RunError: FSDP with one process.
    """
    if config.fsdp:
        if world.size == 1:
            raise RunError("--fsdp shards over several processes and there is one: use --devices, or leave it out")
        for stage in model.children():
            if any(True for _ in stage.parameters()) and type(stage).forward is not nn.Module.forward:
                fully_shard(stage)
        fully_shard(model)  # in place
        return model
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build a timm optimizer; biases and norms get no weight decay, as timm does it.

    Args:
        model: whose parameters.
        config: `optimizer`, `momentum`, `weight_decay` and `lr`.

    Returns:
        The optimizer.

    Raises:
        RunError: timm has no such optimizer, or it does not take these settings.
    """
    if config.optimizer not in list_optimizers():
        known = ", ".join(map(str, list_optimizers()))
        raise RunError(f"timm has no optimizer {config.optimizer!r}: choose one of {known}")
    settings = {"lr": config.peak_lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    try:
        return create_optimizer_v2(model, opt=config.optimizer, **settings)
    except (TypeError, ValueError) as error:
        raise RunError(f"timm's optimizer {config.optimizer!r} does not take {settings}: {error}") from error
