"""The hook of what a branch is multiplied by from outside: in FREEZE undropped rows send no gradient there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.branches import CutPoint
from rdp.phases import Phase
from rdp.training import compiled, first_cycle, gates, parts
from rdp.training.run_hook import RunHook, current_forward, may_leave_no_graph
from rdp.training.step import sent

if TYPE_CHECKING:
    from rdp.training.run import Run


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
        return trees.tensor_at(place, self.point.leaf)
