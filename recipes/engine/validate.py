"""A checkpoint's content, looked at as a whole before any of it is used.

Its checksum tells that it is what was written; this tells that what was written is a checkpoint of this very run. What
is wrong is a `ValueError` that names where, and the checkpoint before it is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

METRICS = ("top1", "top5", "test_loss")


def require(condition: bool, where: str, found: object) -> None:
    """Refuse what does not meet a condition.

    Raises:
        ValueError: it does not; the message names where.
    """
    if not condition:
        shown = f"a {type(found).__name__}" if isinstance(found, (Tensor, dict, list, tuple)) else repr(found)
        raise ValueError(f"its {where} cannot be {shown[:80]}")


def require_keys(value: object, keys: Mapping[str, Any] | Sequence[str], where: str) -> None:
    """Refuse what is not a dict of exactly these keys."""
    require(isinstance(value, dict), where, value)
    assert isinstance(value, dict)
    if value.keys() != set(keys):
        odd = sorted(map(str, value.keys() ^ set(keys)))
        raise ValueError(f"its {where} lacks or has too much: {', '.join(odd[:3])}")


def require_count(value: object, most: float, where: str) -> None:
    """Refuse what is not a whole number from 0 to `most`."""
    require(type(value) is int and 0 <= value <= most, where, value)


def require_finite(value: object, where: str, least: float = -math.inf) -> None:
    """Refuse what is not a finite number of at least `least`."""
    require(type(value) in (int, float) and math.isfinite(value) and value >= least, where, value)  # type: ignore[arg-type,operator]


def require_like(value: object, expected: object, where: str) -> None:
    """Refuse what differs from `expected` in its structure: keys, lengths, types, shapes; not in its numbers."""
    if isinstance(expected, Tensor):
        require(isinstance(value, Tensor), where, value)
        assert isinstance(value, Tensor)
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise ValueError(
                f"its {where} is {value.dtype} {tuple(value.shape)}, not {expected.dtype} {tuple(expected.shape)}"
            )
    elif isinstance(expected, Mapping):
        require_keys(value, expected, where)
        for key, item in expected.items():
            require_like(value[key], item, f"{where}.{key}")  # type: ignore[index]
    else:
        require(type(value) is type(expected), where, value)


def require_optimizer(state: object, optimizer: torch.optim.Optimizer, names: Sequence[object]) -> None:
    """Refuse an optimizer's state that is not one of this optimizer.

    Args:
        state: of `state_dict`.
        optimizer: as it is before its first step; left alone.
        names: what `state` calls its parameters.
    """
    require_keys(state, ("state", "param_groups"), "optimizer")
    assert isinstance(state, dict)
    groups, states = state["param_groups"], state["state"]
    require(isinstance(groups, list) and len(groups) == len(optimizer.param_groups), "optimizer.param_groups", groups)
    named: list[object] = []
    for number, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        where = f"optimizer.param_groups[{number}]"
        require(isinstance(group, dict) and own.keys() <= group.keys(), where, group)
        require(isinstance(group["params"], list) and len(group["params"]) == len(own["params"]), where, group)
        named += group["params"]
        for key, value in own.items():
            if type(value) in (int, float):
                require_finite(group[key], f"{where}.{key}")
            elif value is not None and key not in ("params", "param_names"):  # None: later it may be anything
                require(type(group[key]) is type(value), f"{where}.{key}", group[key])
    require(named == list(names) or set(map(str, named)) == set(map(str, names)), "optimizer.param_groups", named)
    require(isinstance(states, dict) and all(name in names for name in states), "optimizer.state", states)
    for name, kept in states.items():
        require(isinstance(kept, dict), f"optimizer.state[{name}]", kept)


def try_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state with which the next step would fail: what an optimizer keeps, only its step knows.

    Args:
        state: of `state_dict`; left alone.
        optimizer: left alone; another one of its class takes the step, with parameters and gradients of zeros.
    """
    kind: Any = type(optimizer)  # whose own constructor has defaults, as the base class has not
    try:
        trial = kind([group | {"params": _zeros(group["params"])} for group in optimizer.param_groups])
    except (TypeError, ValueError, torch.OutOfMemoryError):  # such as a wrapper around another: nothing can be said
        return
    try:
        trial.load_state_dict(copy.deepcopy(state))
        trial.step()
    except torch.OutOfMemoryError:
        return
    except Exception as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"its optimizer cannot take a step: {cause}") from error


def _zeros(parameters: list[Tensor]) -> list[Tensor]:
    zeros = [torch.zeros_like(parameter, requires_grad=True) for parameter in parameters]
    for zero in zeros:
        zero.grad = torch.zeros_like(zero)
    return zeros


def require_history(history: object, epochs: int, prefixes: Sequence[str], tested: Collection[int]) -> None:
    """Refuse records that are not one dict of finite numbers for each epoch that is done.

    Args:
        history: of `Records`.
        epochs: that are done.
        prefixes: of the networks that were tested, such as "" and "ema_".
        tested: the epochs after which they were.
    """
    require(isinstance(history, list) and len(history) == epochs, "history", history)
    assert isinstance(history, list)
    metrics = [prefix + name for prefix in prefixes for name in METRICS]
    trained = ["epoch", "step", "lr", "train_loss", "train_seconds", "images_per_second"]
    for epoch, line in enumerate(history):
        names = trained + (metrics if epoch in tested else [])
        require_keys(line, names, f"history[{epoch}]")
        require(line["epoch"] == epoch and type(line["epoch"]) is int, f"history[{epoch}].epoch", line["epoch"])
        require_count(line["step"], math.inf, f"history[{epoch}].step")
        for name in names:
            require_finite(line[name], f"history[{epoch}].{name}")
