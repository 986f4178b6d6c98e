"""What is decided before anything is hooked: which models and branches are refused, and the rates of the others."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rdp.branches import NEVER, Branch, Refusal
from rdp.calls import Inputs, check_named
from rdp.copies import Hook
from rdp.discovery import forwards
from rdp.discovery.candidates import Candidate, held
from rdp.discovery.find import Discovery
from rdp.discovery.own_dropping import OwnDropping, own_dropping
from rdp.errors import ArgumentError, AttachError, BranchError, NativeDropPathError, listed
from rdp.inputs import Rows, fresh
from rdp.known import Known
from rdp.look import look
from rdp.native import NativeDrop, find_native_drops
from rdp.options import Options
from rdp.rates import rates_of
from rdp.refusals import count_rows
from rdp.rows.program import Program
from rdp.rows.sizes import find_rows, telling


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
    check_named(model, options.rows)
    drops = find_native_drops(model)
    if drops and options.native == "error":
        raise NativeDropPathError(_drops_by_itself(model, drops))
    modules = dict(model.named_modules())
    for name in options.named:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise BranchError(f"branches names {name!r}, which is no module of {type(model).__name__}{hint}")


def _drops_by_itself(model: nn.Module, drops: Sequence[NativeDrop], effect: str = "") -> str:
    return (
        f"{type(model).__name__} drops paths by itself, and both together would drop more than either: "
        f"{listed([str(drop) for drop in drops])}{effect}. Build it with a drop path rate of 0, or pass native='off' "
        "to silence these until handle.remove()"
    )


def _settings_to_silence(model: nn.Module, options: Options, found: Sequence[OwnDropping]) -> list[NativeDrop]:
    """What has to be silenced, with `native="off"`, so that no branch is left out by chance."""
    for dropping in found:
        branches = listed([f"`{name}`" for name in dropping.branches])
        if not dropping.settings:
            suspects = listed([str(setting) for setting in dropping.suspects]) or "its rate has no name that was known"
            raise NativeDropPathError(
                f"{type(model).__name__} drops paths by itself, and both together would drop more than either: it "
                f"leaves out {branches} in training by chance, and nothing that native='off' could set to 0 was found. "
                f"Build it so that it leaves out none ({suspects})"
            )
        if options.native == "error":
            effect = f", which leaves out {branches} by chance"
            raise NativeDropPathError(_drops_by_itself(model, dropping.settings, effect))
    return [setting for dropping in found for setting in dropping.settings]


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


@dataclass(frozen=True)
class Choice:
    """What `choose_branches` has chosen."""

    branches: tuple[Branch, ...]
    refused: tuple[Refusal, ...]
    programs: Mapping[str, Program]
    """By name, the branches that can be run on some of the rows."""
    found_with: Inputs
    """Two rows of the input; all of it where batch mode knows of no rows."""
    silenced: tuple[NativeDrop, ...] = ()
    """What dropped paths by itself, and does not any more."""
    rows: Rows | None = None
    """Where the inputs have their rows; None where batch mode knows of none."""
    warnings: tuple[str, ...] = ()
    """What the user should be told."""
    unused: frozenset[str] = frozenset()
    """Names of parameters outside of branches that the forward did not use."""


def choose_branches(
    model: nn.Module,
    options: Options,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: Known | None = None,
) -> Choice:
    """Find the branches from forwards of these inputs, of two rows and of one in row mode, and give them their rates.

    Mode, gradients, BatchNorm statistics and random number generators are left as they were.

    Args:
        model: The model.
        options: What `attach` was asked for.
        args, kwargs: Of a forward.
        known: What an earlier choice has brought up.

    Raises:
        BranchError: If none is left, or one cannot do what `options` ask.
        ForwardError: If rows are to be masked, and it is not clear where they are.
        NativeDropPathError: If the model leaves out branches by chance, and is not to be, or cannot be, silenced.
    """
    inputs = args, kwargs
    with ExitStack() as restored:
        with forwards.undisturbed(model):
            rows = find_rows(model, inputs, options)
            with telling(model, inputs, options):
                few = rows.take(inputs, 2) if rows is not None and options.mode == "row" else inputs
                dropping = own_dropping(model, few)
        silenced = _settings_to_silence(model, options, dropping)
        for setting in silenced:
            restored.callback(setting.restore)
            setting.silence()
        choice = _choose_branches(model, options, inputs, rows, known or Known())
        restored.pop_all()
    return replace(choice, silenced=tuple(silenced))


def _choose_branches(
    model: nn.Module,
    options: Options,
    inputs: Inputs,
    rows: Rows | None,
    known: Known,
) -> Choice:
    # A model that is in eval mode as a whole does not say which of its parts will train.
    evaluated = {name for name, module in model.named_modules() if model.training and not module.training}
    with forwards.undisturbed(model):
        seen = look(model, options, inputs, rows, known)
        found, plan, places, odd = seen.found, seen.plan, seen.places, seen.odd
        chosen = selected(model, options, found)
        located = [
            replace(b, gates=tuple(replace(g, rows=at.gates[g.module, g.leaf]) for g in b.gates), cuts=at.cuts)
            for at, b in zip([places[id(c)] for c in chosen], found.branches(chosen), strict=True)
        ]
        located = [replace(b, idle="in eval mode") if b.block in evaluated else b for b in located]
        located = [replace(b, idle="without gradients") if b.name in known.idle else b for b in located]
        outer = {c.name for c, others in zip(chosen, held(chosen), strict=True) if others}
        plan = plan.without(dict.fromkeys(outer, "another branch lies inside it"))
        scattered = {b.name for b in located if any(gate.rows and gate.rows.outer > 1 for gate in b.gates)}
        plan = plan.without(dict.fromkeys(scattered, "the entries of a row do not stand side by side"))
    if not located:
        raise BranchError(_nothing_found(model, options, found))
    refused = found.refused() if options.branches is None else ()
    told = []
    if refused:
        told.append(
            f"{len(refused)} residual sums are left ungated and train plainly: {listed([str(r) for r in refused])}. "
            "Name the modules to gate in branches= if you know better",
        )
    if odd.coupled is not None:
        told.append(
            f"the rows of a batch influence each other even in eval mode, first in `{odd.coupled}`: is the first axis "
            "of the input the batch? If not, use mode='batch'",
        )
    if odd.not_finite is not None:
        told.append(
            f"values are not finite, first in `{odd.not_finite}`: its weights, or the inputs, hold NaN or infinity, "
            "and whether rows influence each other cannot be told",
        )
    if all(branch.idle for branch in located):
        told.append(
            f"all {len(located)} residual branches that were found are in eval mode or run without gradients, so "
            "nothing is gated, and training is plain. Attach when they train"
        )
    number = count_rows(seen.rows, inputs, options.mode)
    rated = tuple(plan.noted(branch).sized(number) for branch in _rated(located, options))
    check_scaling(rated, options, options.rate)
    programs = {name: program for name, program in plan.programs.items() if program.fewest < NEVER}
    few = seen.rows.take(inputs, 2) if seen.rows is not None else fresh(inputs)
    unused = found.graph.unused().difference(*(branch.parameters for branch in rated))
    return Choice(rated, refused, programs, few, warnings=tuple(told), rows=seen.rows, unused=unused)


def check_scaling(branches: Iterable[Branch], options: Options, rate: float) -> None:
    """Refuse to rescale what cannot be, if branches are dropped at this rate.

    Raises:
        BranchError: If a branch ends before a nonlinear function.
    """
    unscalable = [b.name for b in branches if b.gated and any(gate.zero_only for gate in b.gates)]
    if options.scale_by_keep and rate > 0 and unscalable:
        raise BranchError(
            f"scale_by_keep=True needs branches whose ends commute with rescaling; a nonlinear function follows "
            f"{listed(unscalable)}. Use scale_by_keep=False, or leave these out with branches="
        )


def _rated(branches: list[Branch], options: Options) -> list[Branch]:
    """The branches with their rates."""
    rates, shares = (rates_of(branches, rate, options.decay) for rate in (options.rate, 1.0))
    return [replace(b, rate=r, share=s) for b, r, s in zip(branches, rates, shares, strict=True)]


def selected(model: nn.Module, options: Options, found: Discovery) -> list[Candidate]:
    """Those that the user wants gated.

    Raises:
        BranchError: If one that was named is none that can be.
    """
    if options.branches is None:
        return found.accepted
    if callable(options.branches):
        return [c for c in found.accepted if options.branches(c.name, model.get_submodule(c.name))]
    names = set(options.named)
    missing = names - {c.name for c in found.accepted}
    if missing:
        reasons = [str(r) for r in found.refused() if r.name in missing]
        why = f" ({listed(reasons)})" if reasons else ""
        raise BranchError(
            f"branches names {listed(sorted(map(repr, missing)))}, which returned no tensor in a forward of "
            f"{type(model).__name__} and cannot be gated{why}"
        )
    return [c for c in found.accepted if c.name in names]


def _nothing_found(model: nn.Module, options: Options, found: Discovery) -> str:
    text = f"no residual branch to gate in {type(model).__name__}: {found.additions} additions were looked at"
    if found.rejected:
        text += f" ({', '.join(f'{number}x {reason}' for reason, number in found.rejected.items())})"
    if options.branches is not None and found.accepted:
        return f"{text}, and branches= chose none of {listed([c.name for c in found.accepted])}"
    if refused := found.refused():
        text += f"; refused: {listed([str(r) for r in refused])}"
    return f"{text}. If the model has residual branches, name the modules that end them in branches="
