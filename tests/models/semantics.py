"""Is a gated model still the model? Four exact statements about any attached network, checked on random numbers.

1. With all rows undropped, DROP gives the plain output to the bit; so does FREEZE, and the branches get no gradient.
2. With all rows dropped, every gated output is exactly zero (or, for a gated block, its input).
3. With all rows dropped, of the blocks' parameters exactly those listed in branches lose their gradient.
4. The mask of one row changes no other row, and does change its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from laws.masks import draw
from torch import Tensor, nn

import rdp

NEVER, ALWAYS = 1e-12, 1 - 1e-12
"""Rates of branches that are gated, and drop no row or all rows."""
_TINY = 1e-3


def check_gating(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    """Check the four statements.

    Args:
        model: Any model; its weights, gradients and BatchNorm statistics are changed.
        inputs: Keyword arguments of its forward, of two rows.

    Returns:
        What does not hold, in words; nothing if all does.
    """
    wake(model)
    model.train()
    plain, gradients = _run(model, inputs)
    learning = {name for name, gradient in gradients.items() if gradient}
    settings: dict[str, Any] = {"decay": "constant", "compute": "dense", "example_inputs": inputs}
    problems = []

    with rdp.attach(model, NEVER, **settings) as handle:
        listed = {name for branch in handle.branches for name in branch.parameters}
        kept, _ = _run(model, inputs, backward=False)
        handle.advance()
        frozen, gradients = _run(model, inputs)
        moving = {name for name in listed if gradients[name]}
    problems += [] if _equal(kept, plain) else ["DROP with nothing dropped is not the plain forward"]
    problems += [] if _equal(frozen, plain) else ["FREEZE is not the plain forward"]
    problems += [f"FREEZE moves {_some(moving)}"] if moving else []

    with rdp.attach(model, ALWAYS, **settings) as handle:
        leaking, hooks = _watch_gates(model, handle)
        _, gradients = _run(model, inputs)
        for hook in hooks:
            hook.remove()
    problems += [f"dropped branches are not zero: {_some(leaking)}"] if leaking else []
    moving = {name for name in listed if gradients[name]}
    problems += [f"dropped branches learn: {_some(moving)}"] if moving else []
    blocks = tuple(f"{branch.block}." for branch in handle.branches if branch.block)
    unlisted = {name for name in learning - listed if name.startswith(blocks) and not gradients[name]}
    problems += [f"stopped with the branches, but not listed: {_some(unlisted)}"] if unlisted else []

    model.eval()
    for name in {"", *(branch.block for branch in handle.branches)}:
        model.get_submodule(name).training = True  # the gates work, but BatchNorm and dropout do not tie rows together
    twins = {key: value[:1].expand_as(value).clone() for key, value in inputs.items()}
    names = [branch.name for branch in handle.branches]
    settings |= {"branches": lambda name, module: name in names, "seed": _telling_seed(len(names))}
    with rdp.attach(model, 0.5, **settings) as handle:
        apart, _ = _run(model, twins, backward=False)
        first = handle.masks[:, :1]
    with rdp.attach(model, 0.5, mode="batch", **settings) as handle:
        alike, _ = _run(model, twins, backward=False)
        assert torch.equal(handle.masks, first.expand(-1, 2)), "batch mode masks all rows as row mode masks the first"
    problems += [] if _equal(_row(alike, 0), _row(apart, 0)) else ["the mask of one row changes another"]
    problems += [] if not _equal(_row(alike, 1), _row(apart, 1)) else ["the mask of a row changes nothing"]
    return problems


def wake(model: nn.Module) -> None:
    """Give parameters that start near zero (layer scale, last BatchNorm) numbers, or branches would have no effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.abs().max() < _TINY:
                parameter.normal_(std=0.2)


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, sets, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, field.name, None) for field in dataclasses.fields(value)])


def _telling_seed(branches: int) -> int:
    """The first seed with which two rows differ in the masks of at least half of the branches."""
    drawn = (draw([0.5] * branches, 2, seed=seed, cycle=0, micro_batch=0) for seed in itertools.count())
    return next(seed for seed, masks in enumerate(drawn) if 2 * sum(a != b for a, b in masks) >= branches)


def _run(model: nn.Module, inputs: Mapping[str, Tensor], backward: bool = True) -> tuple[list[Tensor], dict[str, bool]]:
    """The outputs of a forward at a fixed seed, and which parameters get a gradient other than zero."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    outputs = [t for t in tensors(model(**{k: v.clone() for k, v in inputs.items()})) if t.is_floating_point()]
    if backward:
        # A random functional: the plain sum of a LayerNorm's output has no gradient.
        sum((t * torch.randn_like(t)).sum() for t in outputs if t.requires_grad).backward()
    moved = {name: p.grad is not None and bool(p.grad.count_nonzero()) for name, p in model.named_parameters()}
    return [t.detach() for t in outputs], moved


def _watch_gates(model: nn.Module, handle: rdp.ResidualDropPath) -> tuple[set[str], list[Any]]:
    """Names of gates whose output is not zero, filled during the next forward, and the hooks to remove."""
    leaking: set[str] = set()
    hooks = []

    def watch(gate: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = list(tensors(output))[gate.leaf]
            expected = next(tensors(args)) if gate.of_block else torch.zeros_like(value)
            if not torch.equal(value, expected):
                leaking.add(gate.module)

        return hook

    for branch in handle.branches:
        hooks += [model.get_submodule(g.module).register_forward_hook(watch(g)) for g in branch.gates]
    return leaking, hooks


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


def _row(outputs: list[Tensor], row: int) -> list[Tensor]:
    return [t[row] for t in outputs if t.dim() and t.shape[0] == 2]


def _some(names: set[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in sorted(names)[:limit]) + more
