"""The hooks of a branch: cut to some rows where it begins, masked where it ends."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.branches import GatePoint
from rdp.errors import ForwardError
from rdp.phases import Phase
from rdp.rows.branch import BranchOnRows
from rdp.training import compiled, gates, parts
from rdp.training.run_hook import RunHook, current_forward, is_plain, may_leave_no_graph, trains_unseen

if TYPE_CHECKING:
    from rdp.training.run import Run


class EntryHook(RunHook):
    """Forward pre-hook of the first module of a branch that runs on some of the rows."""

    def __init__(self, run: Run, branch: int, on_rows: BranchOnRows) -> None:
        super().__init__(run, self.cut, self.cut_traced)
        self.branch, self.key = branch, str(branch)
        self.on_rows = on_rows

    def cut(self, module: nn.Module, *given: Any) -> Any:
        """Cut the arguments to some rows, if there are undropped ones and others."""
        if self.on_rows.replaying:
            return None
        self.on_rows.passing = None  # what an interrupted forward has left behind
        forward = current_forward(self.run)
        if forward is None or forward.phase is Phase.PLAIN:
            return None
        if (forward.plain or not torch.is_grad_enabled()) and is_plain(forward, self.branch):
            return None
        freeze, program = forward.phase is Phase.FREEZE, self.on_rows.program
        kept, rows = forward.kept[self.branch], forward.rows
        if rows < program.fewest and self.run.step.given is None:  # too small to gain, but to be proved
            return None
        if kept == rows or rows == 1 or (kept == 0 and (freeze or not may_leave_no_graph(self.run))):
            return None
        if program.batch_norm and not (kept == 0 < rows - 2 or (kept >= 2 and rows - kept >= 2)):
            return None  # of a single row there may be no statistics
        return self.on_rows.enter(given, functools.partial(forward.split, self.branch), freeze)

    def cut_traced(self, module: nn.Module, *given: Any) -> Any:
        """The same in a graph, where the number of undropped rows is a constant."""
        run, on_rows = self.run, self.on_rows
        if on_rows.replaying:
            return None
        if on_rows.passing is not None:  # what an interrupted forward has left behind
            on_rows.passing = None
        if run.options.mode == "batch" or not gates_traced(self):
            return None
        rows = compiled.split(run, self.branch, on_rows.program)
        return None if rows is None else on_rows.enter(given, lambda _: rows, run.step.phase is Phase.FREEZE)


class LaterHook(RunHook):
    """Forward pre-hook of a later module of such a branch; `name` is the module's."""

    def __init__(self, run: Run, name: str, on_rows: BranchOnRows) -> None:
        super().__init__(run, self.cut, self.cut_traced)
        self.name = name
        self.on_rows = on_rows

    def cut(self, module: nn.Module, *given: Any) -> Any:
        """Cut the arguments from outside to the rows that the branch was entered with."""
        if self.on_rows.replaying or self.on_rows.passing is None:
            return None
        if current_forward(self.run) is None:
            return None  # what was entered is left from a forward that raised
        return self.on_rows.later(self.name, given)

    def cut_traced(self, module: nn.Module, *given: Any) -> Any:
        """The same in a graph."""
        parts.ready(id(self.run))
        if self.on_rows.replaying or self.on_rows.passing is None:
            return None
        return self.on_rows.later(self.name, given)


class GateHook(RunHook):
    """Forward hook of a module that ends a branch.

    Args:
        run: That of the model.
        branch: Index of the branch.
        point: Which output tensor is masked, and along which axis.
        on_rows: The branch, if it runs on some of the rows.
    """

    def __init__(self, run: Run, branch: int, point: GatePoint, on_rows: BranchOnRows | None = None) -> None:
        super().__init__(run, self.gate, self.gate_traced)
        self.branch, self.key = branch, str(branch)
        self.point = point
        self.on_rows = on_rows
        self.switch = run.switches[branch]

    def gate(self, module: nn.Module, *given: Any) -> Any:
        """Mask the output; None leaves it as it is."""
        run, on_rows, output = self.run, self.on_rows, given[-1]
        if on_rows is not None and on_rows.replaying:
            return None
        forward = current_forward(run)
        if forward is None:
            if trains_unseen(run):
                run.watch.stray(run.branches[self.branch].name)
            return None
        forward.reached.add(self.branch)
        if forward.phase not in run.gated_phases:
            return None
        entered = on_rows is not None and on_rows.passing is not None
        if not entered and (forward.plain or not torch.is_grad_enabled()) and is_plain(forward, self.branch):
            return None
        x = trees.tensor_at(output, self.point.leaf)
        if run.options.mode == "row" and hasattr(x, "_local_tensor"):
            raise ForwardError(
                f"the output of `{self.point.module}` is a DTensor, whose rows cannot be masked. Attach after "
                "parallelize_module and let the module return a local tensor (use_local_output=True), or use "
                "mode='batch'"
            )
        keep_prob = 1 - run.step.rates[self.branch] if run.options.scale_by_keep else None
        if on_rows is not None and entered:
            gated = leave(on_rows, forward.phase, x, keep_prob)
        else:
            source = next(trees.tensors(given)) if self.point.of_block else None
            keep: Tensor | bool = forward.kept[self.branch] > 0
            alike = forward.kept[self.branch] in (0, forward.rows)
            if not alike or self.branch in run.in_graph or not may_leave_no_graph(run):
                keep = gates.broadcast_rows(forward.keep(self.branch, x.device), x, self.point)
            gated = gates.gate(forward.phase, keep, x, source, keep_prob)
        if forward.graph is None and gated.requires_grad:
            run.step.mark(forward, gated)  # for a loss that is not made of what the model returns
        elif run.compiled is not None and run.compiled.ticket is not None:
            gated = compiled.mark(run, gated)  # any: the first and the last may be out of the graph here
        if gated is x:
            return None
        return gated if x is output else trees.with_tensor(output, self.point.leaf, gated)

    def gate_traced(self, module: nn.Module, *given: Any) -> Any:
        """The same in one graph for all masks, none of which is looked at, or in that of a switch."""
        run, on_rows, output = self.run, self.on_rows, given[-1]
        if on_rows is not None and on_rows.replaying:
            return None
        entered = on_rows is not None and on_rows.passing is not None
        if not entered and parts.switched(run, self.switch) and parts.counted(id(run)):
            return self._gate_switched(given)
        if not gates_traced(self):
            return None
        now, phase = run.compiled, run.step.phase
        assert now is not None
        x = trees.tensor_at(output, self.point.leaf)
        keep_prob = now.keep_probs[self.branch] if now.keep_probs is not None else None
        if on_rows is not None and entered:
            gated = compiled.marked(run, self.branch, leave(on_rows, phase, x, keep_prob))
        else:
            source = next(trees.tensors(given)) if self.point.of_block else None
            x = compiled.marked(run, self.branch, x)
            keep = gates.broadcast_rows(compiled.in_graph(now.masks[self.branch], x.device), x, self.point)
            gated = gates.gate(phase, keep, x, source, keep_prob)
        return trees.with_tensor(output, self.point.leaf, gated)

    def _gate_switched(self, given: tuple[Any, ...]) -> Any:
        switch, output = self.switch, given[-1]
        if parts.visible(id(self.run)):
            switch.reached = True
        if switch.does is None:
            return None
        phase, keep = switch.does
        x = trees.tensor_at(output, self.point.leaf)
        source = next(trees.tensors(given)) if self.point.of_block else None
        return trees.with_tensor(output, self.point.leaf, gates.gate(phase, keep, x, source, switch.keep_prob))


class IdleHook(RunHook):
    """Forward hook of a branch that did not train when it was found: tells should it begin to."""

    def __init__(self, run: Run, branch: int) -> None:
        super().__init__(run, self.look)
        self.branch = branch

    def look(self, module: nn.Module, *given: Any) -> None:
        """Does it train now?"""
        run = self.run
        if torch.is_grad_enabled() and run.blocks[self.branch].training and current_forward(run) is not None:
            run.watch.wakes(run.branches[self.branch])


def leave(on_rows: BranchOnRows, phase: Phase, x: Tensor, keep_prob: float | Tensor | None) -> Tensor:
    """The output of all rows, of a branch that was entered with some."""
    assert on_rows.passing is not None
    own, others = x, on_rows.replay()[on_rows.program.result] if phase is Phase.FREEZE else None
    if on_rows.passing.own_undropped:
        own = gates.undropped(phase, own, None, keep_prob)
    return on_rows.leave(own, others)


def gates_traced(hook: EntryHook | GateHook) -> bool:
    """Is the branch of a hook gated in the graph that is being traced?"""
    run = hook.run
    parts.ready(id(run))
    if run.compiled is None or not parts.learns(run) or not run.blocks[hook.branch].training:
        return False
    compiled.traced(id(run), hook.key)
    return run.step.phase in run.gated_phases
