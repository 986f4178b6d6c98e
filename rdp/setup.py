"""What `attach` checks and decides before anything is hooked: the model, its inputs, which branches at which rates."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rdp.branches import Branch, Refusal
from rdp.copies import Hook
from rdp.discovery.find import Discovery, find_branches
from rdp.discovery.forwards import batch_size
from rdp.discovery.program import Program
from rdp.errors import ArgumentError, AttachError, BranchError, ForwardError, NativeDropPathError, warn
from rdp.masks import branch_rates
from rdp.native import find_native_drops
from rdp.options import Options

_LISTED = 8
"""How many names an error lists before it says how many more there are."""


def check_model(model: nn.Module, options: Options) -> None:
    """Refuse a model that cannot be attached to, before anything is changed."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise AttachError(
            "torch.nn.DataParallel copies the model into threads, where masks cannot follow. Use "
            "DistributedDataParallel, or attach to model.module and train that"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise AttachError("a scripted model runs no Python hooks. Attach to the model before torch.jit.script")
    check_unattached(model)
    drops = find_native_drops(model)
    if drops and options.native == "error":
        raise NativeDropPathError(
            f"{type(model).__name__} drops paths by itself, and both together would drop more than either: "
            f"{_listed([str(drop) for drop in drops])}. Build it with a drop path rate of 0, or pass native='off' to "
            "silence these until handle.remove()"
        )
    modules = dict(model.named_modules())
    for name in options.named:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise BranchError(f"branches names {name!r}, which is no module of {type(model).__name__}{hint}")


def check_unattached(model: nn.Module, besides: object = None) -> None:
    """Refuse a model that another run than `besides` has put hooks in."""
    for name, module in model.named_modules():
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            if isinstance(hook, Hook) and hook.owner is not besides:
                where = f"its module `{name}`" if name else "it"
                raise AttachError(
                    f"this {type(model).__name__} is attached already ({where} has another handle's hooks); "
                    "call remove() on that handle first"
                )


def check_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of rows of a training forward, or a refusal."""
    rows = batch_size(args, kwargs)
    if rows is None:
        raise ForwardError(
            "the model was called without any tensor that has a batch axis, so there are no rows to mask"
        )
    if rows == 0:
        raise ForwardError("the batch is empty (0 rows); skip it, or train it under handle.paused()")
    if torch._C._functorch.maybe_current_level() is not None:
        raise ForwardError("the model was called under torch.func (vmap, grad, jvp), where rows cannot be told apart")
    return rows


def choose_branches(
    model: nn.Module, options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Branch, ...], tuple[Refusal, ...], Mapping[str, Program]]:
    """Find the branches and give them their rates.

    Returns:
        The branches, what was refused, and by name the branches that can be run on some of the rows.

    Raises:
        BranchError: If none is left, or one cannot do what `options` ask.
    """
    by_row = options.mode == "row"
    found = find_branches(
        model,
        args,
        kwargs,
        options.named,
        need_rows=by_row,
        want_programs=options.compute != "dense",
        allow_random=options.compute in ("rows", "ghost"),
        allow_batch_norm=options.compute == "ghost",
    )
    branches = _selected(model, options, found)
    if not branches:
        raise BranchError(_nothing_found(model, options, found))
    refused = tuple(r for r in found.refused if options.branches is None)
    if refused:
        warn(
            f"{len(refused)} residual sums are left ungated and train plainly: {_listed([str(r) for r in refused])}. "
            "Name the modules to gate in branches= if you know better",
        )
    if found.coupled is not None and by_row:
        warn(
            f"the rows of a batch influence each other even in eval mode, first in `{found.coupled}`: is the first "
            "axis of the input the batch? If not, use mode='batch'",
        )
    rates = branch_rates([branch.depth for branch in branches], options.rate, options.decay)
    rated = tuple(
        replace(branch, rate=rate, compute="rows" if branch.name in found.programs else "dense")
        for branch, rate in zip(branches, rates, strict=True)
    )
    if options.scale_by_keep:
        unscalable = [b.name for b in rated if b.rate > 0 and any(gate.zero_only for gate in b.gates)]
        if unscalable:
            raise BranchError(
                f"scale_by_keep=True needs branches whose ends commute with rescaling; a nonlinear function follows "
                f"{_listed(unscalable)}. Use scale_by_keep=False, or leave these out with branches="
            )
    return rated, refused, found.programs


def shortened(value: object, limit: int = 120) -> str:
    """`repr(value)`, cut where it is long; of a tensor its shape."""
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _selected(model: nn.Module, options: Options, found: Discovery) -> list[Branch]:
    if options.branches is None:
        return list(found.branches)
    if callable(options.branches):
        return [b for b in found.branches if options.branches(b.name, model.get_submodule(b.name))]
    names = set(options.named)
    missing = names - {b.name for b in found.branches}
    if missing:
        reasons = [str(r) for r in found.refused if r.name in missing]
        why = f" ({_listed(reasons)})" if reasons else ""
        raise BranchError(
            f"branches names {_listed(sorted(map(repr, missing)))}, which returned no tensor in a forward of "
            f"{type(model).__name__} and cannot be gated{why}"
        )
    return [b for b in found.branches if b.name in names]


def _nothing_found(model: nn.Module, options: Options, found: Discovery) -> str:
    text = f"no residual branch to gate in {type(model).__name__}: {found.additions} additions were looked at"
    if found.rejected:
        text += f" ({', '.join(f'{number}x {reason}' for reason, number in found.rejected.items())})"
    if options.branches is not None and found.branches:
        return f"{text}, and branches= chose none of {_listed([b.name for b in found.branches])}"
    if found.refused:
        text += f"; refused: {_listed([str(r) for r in found.refused])}"
    return f"{text}. If the model has residual branches, name the modules that end them in branches="


def _listed(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
