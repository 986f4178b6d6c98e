"""Checking that a branch, run on one row at a time, gives what the model gives for two rows together.

That a branch treats rows independently is not taken on trust: its program, and the model's own code fed with some of
the rows, must reproduce the model's own output.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.discovery.chance import Watch
from rdp.discovery.forwards import (
    Enough,
    Inputs,
    as_in_training,
    generators,
    observe,
    only_device,
    own_random_numbers,
    run,
)
from rdp.rows.branch import BranchOnRows, Split
from rdp.rows.program import Program, draws_random_numbers

Programs = Mapping[str, Program]
Outputs = Mapping[str, list[Tensor]]
"""By name of the module that ends the branch."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2


def verify_programs(model: nn.Module, pair: Inputs, programs: Programs) -> dict[str, str]:
    """Run a branch of each kind on the first row in the model's own forward, and on the second by its program.

    Branches of one kind are the same functions, called by modules of the same classes: the first stands for all. The
    forward ends when each kind has been seen, which in most models is soon.

    Returns:
        By name, why a branch failed; empty if all are exact.
    """
    if any(p.is_meta for p in model.parameters()):
        return dict.fromkeys(programs, "not verified on meta tensors")
    # Training mode shows also the code that only runs there; but where random numbers are drawn, nothing could be
    # compared in it.
    kinds: dict[tuple[bool, tuple[str, ...]], list[str]] = defaultdict(list)
    for name, program in programs.items():
        kinds[draws_random_numbers(model, program), program.kind].append(name)
    random = {names[0]: programs[names[0]] for (draws, _), names in kinds.items() if draws}
    exact = {names[0]: programs[names[0]] for (draws, _), names in kinds.items() if not draws}
    failed: dict[str, str] = {}
    for tried, alike in ((random, own_random_numbers), (exact, as_in_training)):
        if tried:
            with alike(model):
                expected = observe(model, pair, tried)
            with alike(model):
                failed |= _verify(model, pair, tried, expected)
    return {name: failed[names[0]] for names in kinds.values() if names[0] in failed for name in names}


def _verify(model: nn.Module, pair: Inputs, programs: Programs, expected: Outputs) -> dict[str, str]:
    failed: dict[str, str] = {}
    while remaining := {name: program for name, program in programs.items() if name not in failed}:
        entered: list[str] = []
        left: list[str] = []
        try:
            failed |= _run(model, pair, remaining, expected, entered, left)
            break
        except Exception as error:
            culprits = entered[-1:] or left[-1:] or remaining
            failed |= dict.fromkeys(culprits, f"a forward on some rows raised {type(error).__name__}")
    return failed


def _run(
    model: nn.Module, pair: Inputs, programs: Programs, expected: Outputs, entered: list[str], left: list[str]
) -> dict[str, str]:
    """Note which branches are running, and which have been left, in the order in which they were."""
    different: dict[str, str] = {}
    may_stop = only_device(model) is not None  # asked before there are hooks
    hooks = []
    watch = Watch()

    def drawn() -> object:
        return watch.draws, generators()

    def check(name: str, program: Program) -> None:
        branch = BranchOnRows(model, program)
        drawn_before: list[object] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if branch.replaying:
                return None
            entered.append(name)
            drawn_before.append(drawn())
            return branch.enter(
                (args, kwargs), lambda device: Split(*torch.arange(2, device=device).chunk(2)), freeze=True
            )

        def later(operation: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
            return (
                branch.later(operation, (args, kwargs)) if branch.passing is not None and not branch.replaying else None
            )

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if branch.replaying:
                return None
            draws = [drawn()] != drawn_before[-1:]
            leaf, replaced = program.result_leaf, output
            if branch.passing is None:
                different[name] = "it is called otherwise than when it was traced"
            else:
                kept, wanted = list(trees.tensors(output))[leaf], expected[name][leaf]
                found = branch.leave(kept, branch.replay()[program.result])
                if draws:
                    different[name] = "it draws random numbers"
                elif not close(found, wanted):
                    finite = bool(wanted.isfinite().all())
                    different[name] = "its rows influence each other" if finite else "its values are not finite"
                # What follows is checked against the plain forward again, not against this one's rounding errors.
                replaced = trees.with_tensor(output, leaf, wanted.clone())
            entered.remove(name)
            left.append(name)
            if may_stop and len(left) == len(programs):
                raise Enough
            return replaced

        hooks.append(model.get_submodule(program.entry).register_forward_pre_hook(enter, with_kwargs=True))
        for operation in program.later_modules:
            hook = functools.partial(later, operation)
            hooks.append(model.get_submodule(operation).register_forward_pre_hook(hook, with_kwargs=True))
        hooks.append(model.get_submodule(name).register_forward_hook(leave))

    try:
        for name, program in programs.items():
            check(name, program)
        with watch:
            run(model, pair)
    finally:
        for handle in hooks:
            handle.remove()
    return different


def close(found: Tensor, wanted: Tensor) -> bool:
    """Are they equal, to rounding?"""
    if found.shape != wanted.shape or not wanted.numel():
        return found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max()
    return bool(error <= _TOLERANCE.get(wanted.dtype, _HALF_TOLERANCE) * wanted.double().abs().max() + 1e-12)
