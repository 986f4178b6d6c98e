"""The forward hooks that `attach` injects. They read the state of the run and decide nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rdp import frames, trees
from rdp.branches import Branch, CutPoint, GatePoint
from rdp.copies import Hook
from rdp.errors import ForwardError
from rdp.phases import Phase
from rdp.rows.branch import BranchOnRows
from rdp.rows.program import Program
from rdp.training import compiled, first_cycle, gates, parts
from rdp.training.recomputation import in_reentrant_checkpoint
from rdp.training.step import Forward, sent

if TYPE_CHECKING:
    from rdp.training.run import Run


def install_on_model(run: Run) -> Iterator[RemovableHandle]:
    """Hook the model itself: masks are decided there, once, for all branches."""
    begin = RunHook(run, run.begin, functools.partial(compiled.begin, run))
    end = RunHook(run, run.end, functools.partial(compiled.end, run))
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


class RunHook(Hook):
    """A hook that asks the run what to do, in one way in Python and in another in the graph of a compiler.

    Args:
        run: That of the model.
        eager: Called with what torch gives a hook.
        traced: The same for a compiler to look into; None does nothing.
    """

    def __init__(self, run: Run, eager: Callable[..., Any], traced: Callable[..., Any] | None = None) -> None:
        super().__init__(run)
        self.run = run
        self.eager = eager
        self.traced = traced

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """What torch calls."""
        if torch.compiler.is_compiling():
            return self.traced(module, *given) if self.traced is not None else None
        return self.eager(module, *given)


class EntryHook(RunHook):
    """Forward pre-hook of the first module of a branch that runs on some of the rows."""

    def __init__(self, run: Run, branch: int, on_rows: BranchOnRows) -> None:
        super().__init__(run, self.cut, self.cut_traced)
        self.branch = branch
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
        if run.options.mode == "batch" or not gates_traced(run, self.branch):
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
        self.branch = branch
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
        x = output if isinstance(output, Tensor) else list(trees.tensors(output))[self.point.leaf]
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
        if not gates_traced(run, self.branch):
            return None
        now, phase = run.compiled, run.step.phase
        assert now is not None
        x = output if isinstance(output, Tensor) else list(trees.tensors(output))[self.point.leaf]
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
        x = output if isinstance(output, Tensor) else list(trees.tensors(output))[self.point.leaf]
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


class CutHook(RunHook):
    """Hook of a module that takes or returns what a branch is multiplied by, and that is not made from its x.

    Args:
        run: That of the model.
        branch: Index of the branch.
        point: Which tensor is cut, and along which axis.
    """

    def __init__(self, run: Run, branch: int, point: CutPoint) -> None:
        super().__init__(run, self.cut, self.cut_traced)
        self.branch = branch
        self.point = point
        self.switch = run.switches[branch]

    def cut(self, module: nn.Module, *given: Any) -> Any:
        """Stop the gradients of what does not learn; None leaves the tensor as it is."""
        forward = current_forward(self.run)
        if forward is None or forward.phase is Phase.PLAIN or self.branch in forward.plain:
            return None
        kept = forward.kept[self.branch]
        if forward.phase is Phase.DROP:
            if not kept:  # where what it is multiplied by is zero, so is its gradient
                first_cycle.sends_zeros(self._tensor(given))
            return None
        if not kept:
            return None
        all_kept = kept == forward.rows and may_leave_no_graph(self.run)
        return self._cut(given, lambda x: True if all_kept else forward.keep(self.branch, x.device), sent)

    def cut_traced(self, module: nn.Module, *given: Any) -> Any:
        """The same in one graph for all masks, or in that of a switch."""
        if parts.switched(self.run, self.switch):
            return self._cut(given, lambda _: True, compiled.in_graph) if self.switch.cuts else None
        now, phase, send = self.run.compiled, self.run.step.phase, compiled.in_graph
        if now is None or phase is not Phase.FREEZE or not self.run.blocks[self.branch].training:
            return None
        return self._cut(given, lambda x: send(now.masks[self.branch], x.device), send)

    def _cut(self, given: tuple[Any, ...], rows: Callable[[Tensor], Tensor | bool], send: Callable[..., Tensor]) -> Any:
        x = self._tensor(given)
        if not x.requires_grad:
            return None
        keep, elements = rows(x), self.point.elements
        if isinstance(keep, Tensor):
            keep = gates.broadcast_rows(keep, x, self.point)
        cut = gates.cut(keep, x, None if elements is None else send(elements, x.device))
        if not torch.compiler.is_compiling():
            first_cycle.sends_zeros(cut)
        return trees.with_tensor(self._place(given), self.point.leaf, cut)

    def _place(self, given: tuple[Any, ...]) -> Any:
        return given if self.point.of_input else given[-1]

    def _tensor(self, given: tuple[Any, ...]) -> Tensor:
        place = self._place(given)
        return place if isinstance(place, Tensor) else list(trees.tensors(place))[self.point.leaf]


def leave(on_rows: BranchOnRows, phase: Phase, x: Tensor, keep_prob: float | Tensor | None) -> Tensor:
    """The output of all rows, of a branch that was entered with some."""
    assert on_rows.passing is not None
    own, others = x, on_rows.replay()[on_rows.program.result] if phase is Phase.FREEZE else None
    if on_rows.passing.own_undropped:
        own = gates.undropped(phase, own, None, keep_prob)
    return on_rows.leave(own, others)


def gates_traced(run: Run, branch: int) -> bool:
    """Is a branch gated in the graph that is being traced?"""
    parts.ready(id(run))
    if run.compiled is None or not parts.learns(run) or not run.blocks[branch].training:
        return False
    compiled.traced(id(run), branch)
    return run.step.phase in run.gated_phases


def is_plain(forward: Forward, branch: int) -> bool:
    """Is the block of this branch in eval mode, or does it run without gradients, and not for a checkpoint?"""
    if branch in forward.plain:
        return True
    return not torch.is_grad_enabled() and not any(map(frames.is_autograd_function, frames.callers()))


def current_forward(run: Run) -> Forward | None:
    """The forward that a gate called now belongs to; None if it is not gated, or not in a forward at all."""
    if run.calls.running:
        # One that is not over in eval mode was interrupted.
        return run.calls.running[-1] if run.model.training else None
    return run.calls.of_backward(run.step)


def trains_unseen(run: Run) -> bool:
    """Is a branch that is not gated now trained all the same, by somebody who calls parts of the model?"""
    unseen = not run.calls.running and not run.pauses and torch._C._current_graph_task_id() == -1
    return unseen and run.model.training and torch.is_grad_enabled()


def may_leave_no_graph(run: Run) -> bool:
    """May a branch whose rows are all alike be left out of the graph?"""
    # A checkpoint that is recomputed for its graph may hold nothing but this branch. And with a mask for each row,
    # another process may need what this one does not: sharded gradients are reduced by all or by none.
    return (run.options.mode == "batch" or not run.several) and not in_reentrant_checkpoint()
