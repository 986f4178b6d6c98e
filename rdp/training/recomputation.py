"""Which forward a call of a module in a backward belongs to: activation checkpointing runs modules again there.

The node of the autograd graph that asks for the recomputation tells, perhaps after the next forward has begun: nodes
are numbered in order of creation, so every forward owns an interval of numbers.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import nn
from torch.autograd.graph import Node

from rdp.training.step import Forward, Step


class Calls(threading.local):
    """The calls of the model that a thread is in; a copy is empty.

    Attributes:
        running: Their forwards, the innermost last; None stands for a call that is not gated.
    """

    def __init__(self) -> None:
        self.running: list[Forward | None] = []
        self._recomputed: Forward | None = None
        """The forward that the running backward has recomputed a part of last."""

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    def of_backward(self, step: Step) -> Forward | None:
        """The forward of `step` that the running backward recomputes a part of; None outside of a backward."""
        node: Node | None = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        for forward in reversed(step.forwards):
            if forward.nodes[0] <= number < forward.nodes[1]:
                if self._recomputed is None:
                    torch.autograd.Variable._execution_engine.queue_callback(self._forget_recomputed)
                self._recomputed = forward
                return forward
        # A node made during a recomputation (nested checkpoints): it belongs to the forward being recomputed.
        return self._recomputed if self._recomputed in step.forwards else None

    def _forget_recomputed(self) -> None:
        self._recomputed = None

    def forget_interrupted(self, module: nn.Module) -> None:
        """Forget calls of `module` that never ended: where KeyboardInterrupt ends one, no hook is called."""
        frame, calls = sys._getframe(), 0
        while frame.f_back is not None:
            frame = frame.f_back
            calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        interrupted = self.running[: len(self.running) - (calls - 1)]
        del self.running[: len(interrupted)]
        for forward in interrupted:
            if forward is not None:
                forward.spent = True


def in_reentrant_checkpoint() -> bool:
    """Is a checkpoint with use_reentrant=True being recomputed? Its first run had no graph, but this one needs one."""
    node: Node | None = torch._C._current_autograd_node()
    return node is not None and "Checkpoint" in node.name()
