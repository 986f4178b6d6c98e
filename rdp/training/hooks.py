"""The forward hooks that `attach` injects, and where. They read the state of the run and decide nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.utils.hooks import RemovableHandle

from rdp.branches import Branch
from rdp.rows.branch import BranchOnRows
from rdp.rows.program import Program
from rdp.training import compiled, model_hooks
from rdp.training.cut_hook import CutHook
from rdp.training.gate_hooks import EntryHook, GateHook, IdleHook, LaterHook
from rdp.training.run_hook import RunHook

if TYPE_CHECKING:
    from rdp.training.run import Run


def install_on_model(run: Run) -> Iterator[RemovableHandle]:
    """Hook the model itself: masks are decided there, once, for all branches."""
    begin = RunHook(run, functools.partial(model_hooks.begin, run), functools.partial(compiled.begin, run))
    end = RunHook(run, functools.partial(model_hooks.end, run), functools.partial(compiled.end, run))
    yield run.model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    yield run.model.register_forward_hook(end, always_call=True)


def install(run: Run, index: int, branch: Branch, program: Program | None) -> Iterator[RemovableHandle]:
    """Hook a branch, if it is to be gated.

    Args:
        run: That of the model.
        index: Of the branch among those of the handle.
        branch: The branch.
        program: The same, if it is to run on some of the rows.
    """
    model = run.model
    if not branch.gated:
        for point in branch.gates if branch.idle else ():
            yield model.get_submodule(point.module).register_forward_hook(IdleHook(run, index))
        return
    on_rows = BranchOnRows(model, program) if program is not None else None
    if program is not None and on_rows is not None:
        entry = model.get_submodule(program.entry)
        yield entry.register_forward_pre_hook(EntryHook(run, index, on_rows), with_kwargs=True, prepend=True)
        for name in program.later_modules:
            later = LaterHook(run, name, on_rows)
            yield model.get_submodule(name).register_forward_pre_hook(later, with_kwargs=True)
    for point in branch.gates:
        gate = GateHook(run, index, point, on_rows)
        # What a block is given may come by keyword.
        yield model.get_submodule(point.module).register_forward_hook(gate, with_kwargs=point.of_block)
    for cut in branch.cuts:
        module, hook = model.get_submodule(cut.module), CutHook(run, index, cut)
        if cut.of_input:
            yield module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            yield module.register_forward_hook(hook)
