"""The forward hooks that `attach` injects. They read the state of the run and decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rdp import gates, passes, traced
from rdp.branches import Branch, GatePoint
from rdp.copies import Hook
from rdp.discovery.program import Program
from rdp.discovery.trace import tensors_in
from rdp.errors import ForwardError
from rdp.forward import Forward, in_backward
from rdp.phases import Phase
from rdp.rows import BranchOnRows

if TYPE_CHECKING:
    from rdp.run import Run


def install(run: Run, index: int, branch: Branch, program: Program | None) -> Iterator[RemovableHandle]:
    """Hook a branch.

    Args:
        run: That of the model.
        index: Of the branch among those of the handle.
        branch: The branch.
        program: The same, if it is to run on some of the rows.
    """
    model = run.model
    on_rows = BranchOnRows(model, program) if program is not None else None
    if program is not None and on_rows is not None:
        entry = model.get_submodule(program.entry)
        yield entry.register_forward_pre_hook(EntryHook(run, index, on_rows), with_kwargs=True, prepend=True)
        for name in program.later_modules:
            later = LaterHook(run, name, on_rows)
            yield model.get_submodule(name).register_forward_pre_hook(later, with_kwargs=True)
    keep_prob = 1 - branch.rate if run.options.scale_by_keep else None
    for point in branch.gates:
        gate = GateHook(run, index, point, keep_prob, on_rows)
        yield model.get_submodule(point.module).register_forward_hook(gate)


class RunHook(Hook):
    """A hook that asks the run what to do."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.run = run


class BeginHook(RunHook):
    """Forward pre-hook of the model: masks are decided here, once, for all branches.

    Args:
        run: That of the model.
        discover: Called with the arguments of the first training forward, if the branches are not known by then.
    """

    def __init__(self, run: Run, discover: Callable[..., None]) -> None:
        super().__init__(run)
        self.discover = discover

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Start a forward."""
        if torch.compiler.is_compiling():
            traced.begin(self.run, args, kwargs)
        else:
            traced.uncompiled(passes.begin, self.run, self.discover, module, args, kwargs)


class EndHook(RunHook):
    """Forward hook of the model, called also when the forward raised."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """End a forward."""
        if torch.compiler.is_compiling():
            self.run.traced_masks = None
            return None
        return traced.uncompiled(passes.end, self.run, output)


class EntryHook(RunHook):
    """Forward pre-hook of the first module of a branch that runs on some of the rows.

    Args:
        run: That of the model.
        branch: Index of the branch.
        on_rows: The branch.
    """

    def __init__(self, run: Run, branch: int, on_rows: BranchOnRows) -> None:
        super().__init__(run)
        self.branch = branch
        self.on_rows = on_rows

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Cut the arguments to undropped rows, if there are such and others."""
        if torch.compiler.is_compiling() or self.on_rows.replaying:
            return None
        self.on_rows.forget()
        forward = self.run.current_forward()
        if forward is None or forward.phase is Phase.PLAIN:
            return None
        freeze, program = forward.phase is Phase.FREEZE, self.on_rows.program
        kept, rows = forward.kept(self.branch), forward.rows
        if kept == rows or rows == 1 or (kept == 0 and (freeze or not passes.may_leave_no_graph(self.run))):
            return None
        if program.batch_norm and not (kept == 0 < rows - 2 or (kept >= 2 and rows - kept >= 2)):
            return None  # of a single row there may be no statistics
        device = next(tensors_in((args, kwargs))).device
        split = forward.split(self.branch, device)
        return self.on_rows.enter(args, kwargs, split, freeze)


class LaterHook(RunHook):
    """Forward pre-hook of a later module of such a branch.

    Args:
        run: That of the model.
        name: Qualified name of the module.
        on_rows: The branch.
    """

    def __init__(self, run: Run, name: str, on_rows: BranchOnRows) -> None:
        super().__init__(run)
        self.name = name
        self.on_rows = on_rows

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Cut the arguments from outside to the rows that the branch was entered with."""
        if torch.compiler.is_compiling() or self.on_rows.replaying or not self.on_rows.passing:
            return None
        if self.run.current_forward() is None:
            return None  # what was entered is left from a forward that raised
        return self.on_rows.later(self.name, args, kwargs)


class GateHook(RunHook):
    """Forward hook of a module that ends a branch.

    Args:
        run: That of the model.
        branch: Index of the branch.
        point: Which output tensor is masked, and along which axis.
        keep_prob: With `scale_by_keep`, what undropped rows are divided by in DROP.
        on_rows: The branch, if it runs on some of the rows.
    """

    def __init__(
        self,
        run: Run,
        branch: int,
        point: GatePoint,
        keep_prob: float | None,
        on_rows: BranchOnRows | None = None,
    ) -> None:
        super().__init__(run)
        self.branch = branch
        self.point = point
        self.keep_prob = keep_prob
        self.on_rows = on_rows

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Mask the output; None leaves it as it is."""
        if torch.compiler.is_compiling():
            return self._gate_traced(args, output)
        if self.on_rows is not None and self.on_rows.replaying:
            return None
        forward = self.run.current_forward()
        if forward is None:
            self._warn_if_stray()
            return None
        if not self._gates_in(forward.phase):
            return None
        self.run.watch.reached.add(self.branch)
        x, source = self._tensors(args, output)
        if self.run.options.mode == "row" and hasattr(x, "_local_tensor"):
            raise ForwardError(
                f"the output of `{self.point.module}` is a DTensor, whose rows cannot be masked. Attach after "
                "parallelize_module and let the module return a local tensor (use_local_output=True), or use "
                "mode='batch'"
            )
        if self.on_rows is not None and self.on_rows.passing:
            gated = self._gate_some_rows(forward, x, self.on_rows)
        elif (keep := forward.keeps_all(self.branch)) is not None and passes.may_leave_no_graph(self.run):
            gated = self._gate_whole(x, source, forward.phase, keep)
        else:
            gated = self._gate_rows(forward.phase, forward.keep(self.branch, x.device), x, source)
        return None if gated is x else self._replaced(output, gated)

    def _gate_traced(self, args: Any, output: Any) -> Any:
        """The same in one graph for all masks: no work is skipped, and no mask is looked at."""
        masks, phase = self.run.traced_masks, self.run.traced_phase
        if masks is None or not self._gates_in(phase):
            return None
        x, source = self._tensors(args, output)
        keep = masks[self.branch].to(x.device, non_blocking=True)
        return self._replaced(output, self._gate_rows(phase, keep, x, source))

    def _gates_in(self, phase: Phase) -> bool:
        return phase is Phase.DROP or (phase is Phase.FREEZE and self.run.options.freeze == "output")

    def _tensors(self, args: Any, output: Any) -> tuple[Tensor, Tensor | None]:
        x = output if isinstance(output, Tensor) else list(tensors_in(output))[self.point.leaf]
        return x, next(tensors_in(args)) if self.point.of_block else None

    def _replaced(self, output: Any, gated: Tensor) -> Any:
        return gated if isinstance(output, Tensor) else gates.replace_leaf(output, self.point.leaf, gated)

    def _gate_rows(self, phase: Phase, keep: Tensor, x: Tensor, source: Tensor | None) -> Tensor:
        rows = self.point.rows
        # Batch mode, whose mask is the same in all rows, knows no row axis.
        keep = keep[0] if rows is None else gates.broadcast_rows(keep, x, rows.axis, self.point.module)
        if phase is Phase.DROP:
            return gates.drop_rows(x, keep, self.keep_prob) if source is None else gates.drop_block(x, source, keep)
        return gates.freeze_rows(x, keep) if source is None else gates.freeze_block(x, source, keep)

    def _gate_some_rows(self, forward: Forward, x: Tensor, on_rows: BranchOnRows) -> Tensor:
        if forward.phase is Phase.FREEZE:
            return on_rows.leave_freeze(x)
        return on_rows.leave_drop(x if self.keep_prob is None else gates.rescale(x, self.keep_prob))

    def _gate_whole(self, x: Tensor, source: Tensor | None, phase: Phase, keep: bool) -> Tensor:
        """Constants and detached outputs leave no graph behind, so nothing is computed backwards."""
        if keep and phase is Phase.FREEZE:
            return x.detach() if source is None else x.detach() + (source - source.detach())
        if keep:
            return x if self.keep_prob is None else gates.rescale(x, self.keep_prob)
        if phase is Phase.FREEZE:
            return x
        # A block may return another dtype than it takes, under autocast.
        return torch.zeros_like(x) if source is None else source.to(x.dtype, copy=True)

    def _warn_if_stray(self) -> None:
        run = self.run
        if run.forwards.running or run.pauses or not (run.model.training and torch.is_grad_enabled()):
            return
        if not in_backward():
            run.watch.warn(
                "stray",
                f"branch `{run.branches[self.branch].name}` ran outside of a forward of the attached model, so it "
                f"is trained plainly. Call the {type(run.model).__name__} itself, not its parts, or attach to the "
                "part that is called",
            )
