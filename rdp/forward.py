"""One training forward as the gates see it, and finding the forward that a gate belongs to."""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from rdp.errors import ForwardError
from rdp.phases import Phase
from rdp.rows import Split

_REMEMBERED = 256
"""Forwards of one step whose activations may still be recomputed; more than anyone accumulates."""


class Forward:
    """The phase and the masks of one training forward.

    Args:
        phase: DROP, FREEZE or PLAIN.
        masks: Bool `Tensor[branches, rows]` on the CPU.
    """

    def __init__(self, phase: Phase, masks: Tensor) -> None:
        self.phase = phase
        self.masks = masks
        self.first_node = 0
        self.last_node: int | None = None
        self._handled = id(sys.exception())  # a reference would keep all the tensors of its traceback
        self._on_device: dict[tuple[str, torch.device], tuple[Tensor, ...]] = {}
        self._kept: list[int] = []

    @property
    def rows(self) -> int:
        """The number of rows of the batch."""
        return self.masks.shape[1]

    def has_raised(self) -> bool:
        """Asked at its end: does it end with an exception, and not in the midst of handling one from before?"""
        return sys.exception() is not None and id(sys.exception()) != self._handled

    def keep(self, branch: int, device: torch.device) -> Tensor:
        """The mask of a branch, bool `Tensor[rows]` on `device`; all branches are copied at the first request."""
        if ("masks", device) not in self._on_device:
            self._on_device["masks", device] = _sent(self.masks, device).unbind(0)
        return self._on_device["masks", device][branch]

    def kept(self, branch: int) -> int:
        """How many rows of a branch are undropped."""
        if not self._kept:
            self._kept = self.masks.sum(1).tolist()
        return self._kept[branch]

    def keeps_all(self, branch: int) -> bool | None:
        """True if all rows of a branch are undropped, False if none is, None if there are both."""
        kept = self.kept(branch)
        return kept > 0 if kept in (0, self.rows) else None

    def split(self, branch: int, device: torch.device) -> Split:
        """The undropped and the dropped rows of a branch, on `device`; all branches are copied at the first request."""
        if ("rows", device) not in self._on_device:
            order = torch.argsort(self.masks.to(torch.int8), dim=1, descending=True, stable=True)
            self._on_device["rows", device] = _sent(order, device).unbind(0)
        order, kept = self._on_device["rows", device][branch], self.kept(branch)
        return Split(order[:kept], order[kept:])


class _Stack(threading.local):
    """The calls of the model that a thread is in; None stands for one that is not gated. A copy is empty."""

    def __init__(self) -> None:
        self.calls: list[Forward | None] = []

    def __reduce__(self) -> tuple[type[_Stack], tuple[()]]:
        return _Stack, ()


class Forwards:
    """The forwards of the current step: the one that runs now, and those whose backward may still recompute parts.

    Activation checkpointing runs modules again during backward, perhaps after the next forward has begun. The node
    of the autograd graph that asks for the recomputation tells which forward it belongs to: nodes are numbered in
    order of creation, so every forward owns an interval of numbers.
    """

    def __init__(self) -> None:
        self._stack = _Stack()
        self._past: list[Forward] = []
        self._recomputed: Forward | None = None

    @property
    def running(self) -> list[Forward | None]:
        """The calls of the model that this thread is in, the innermost last; None is one that is not gated."""
        return self._stack.calls

    def begin(self, forward: Forward | None) -> None:
        """The model has been called."""
        if forward is not None and forward.last_node is None and not torch.compiler.is_compiling():
            forward.first_node = _next_node()
        self.running.append(forward)

    def forget_interrupted(self, calls: int) -> list[Forward]:
        """Forget what never ended: where KeyboardInterrupt ends a forward, no hook is called.

        Args:
            calls: How many calls of the model are running.

        Returns:
            The forwards that were interrupted.
        """
        interrupted = self.running[: len(self.running) - calls]
        del self.running[: len(interrupted)]
        return [forward for forward in interrupted if forward is not None]

    def begin_recomputed(self) -> None:
        """The model has been called by a checkpoint that recomputes the whole of it."""
        forward = self.recomputed()
        self.begin(forward)  # in any case, since the end of the call will be noticed too
        if forward is None:
            raise ForwardError(
                "the whole model is recomputed by a checkpoint with use_reentrant=True, whose first forward runs "
                "without gradients and was taken for a plain one. Pass use_reentrant=False, or checkpoint its blocks"
            )

    def end(self) -> Forward | None:
        """The model has returned, or raised; returns the forward that this ends."""
        forward = self.running.pop() if self.running else None
        if forward is not None and forward.last_node is None and not torch.compiler.is_compiling():
            forward.last_node = _next_node()
            self._past.append(forward)
            del self._past[:-_REMEMBERED]
        return forward

    def forget(self) -> None:
        """The step is over: nothing of it will be recomputed."""
        self._past.clear()
        self._recomputed = None

    def current(self) -> Forward | None:
        """The forward that a gate called now belongs to; None if it is not gated, or not in a forward at all."""
        if self.running:
            return self.running[-1]
        return None if torch.compiler.is_compiling() else self.recomputed()

    def recomputed(self) -> Forward | None:
        """The forward of which the running backward recomputes a part; None outside of a backward."""
        node: Node | None = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        for forward in reversed(self._past):
            if forward.last_node is not None and forward.first_node <= number < forward.last_node:
                self._recomputed = forward
                return forward
        # A node made during a recomputation (nested checkpoints): it belongs to the forward being recomputed.
        return self._recomputed


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, which the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def in_backward() -> bool:
    """Is an autograd graph being run backwards by this thread?"""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Is a checkpoint with use_reentrant=True being recomputed? Its first run had no graph, but this one needs one."""
    node: Node | None = torch._C._current_autograd_node()
    return node is not None and "Checkpoint" in node.name()


def calls_running(module: nn.Module) -> int:
    """How many calls of `module` this thread is in."""
    frame, calls = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
    return calls


def _next_node() -> int:
    """The number that the next node of the autograd graph will get, give or take this one."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr()) if node is not None else 0
