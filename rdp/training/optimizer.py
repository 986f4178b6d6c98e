"""An optimizer that leaves frozen parameters alone and tells the run when a step is over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rdp.errors import ArgumentError, AttachError
from rdp.training.keeping import Keeper, Kept

if TYPE_CHECKING:
    from rdp.training.run import Run

_OWN = frozenset({"optimizer", "_run", "_hidden", "_keeper"})
_MOVES = frozenset({"train", "eval"})  # of schedule-free optimizers: from one average of the parameters to another
# With this attribute of fused optimizers, GradScaler would step them regardless of infs, and the phase would advance;
# without it, GradScaler unscales, checks, and calls `step` only when there is none.
_HIDDEN = "_step_supports_amp_scaling"


class MaskedOptimizer(Optimizer):
    """Any `torch.optim` optimizer, in which frozen parameters do not move.

    A parameter that no row reached the loss through is *frozen* for that step: the parameter and its optimizer state
    stay bit-identical, which a gradient of zero does not achieve (momentum and weight decay move it). During `step`
    its gradient is hidden; after it the handle goes to the next phase.

    Everything else is the wrapped optimizer: `param_groups`, `state`, `defaults`, `state_dict` and all other
    attributes, so checkpoints interchange with those of a plain run.

    Args:
        optimizer: The optimizer to wrap.
        handle: Of the attached model.

    Raises:
        ArgumentError: If `optimizer` is no `torch.optim.Optimizer`, or is wrapped already.
    """

    def __init__(self, optimizer: Optimizer, handle: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(f"wrap needs a torch.optim.Optimizer; got {type(optimizer).__name__}")
        if isinstance(optimizer, MaskedOptimizer):
            raise ArgumentError("this optimizer is wrapped already; wrap the plain one, once")
        if hasattr(optimizer, "step_was_skipped"):
            # Its `step` does nothing between accumulated micro-batches, which cannot be seen from outside.
            raise ArgumentError(
                f"this {type(optimizer).__name__} has been through accelerator.prepare; wrap first and prepare the "
                "result: accelerator.prepare(handle.wrap(optimizer))"
            )
        # Optimizer.__init__ is not called: it would make groups and state of its own.
        self.optimizer = optimizer
        self._run: Run = handle._run
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._keeper = Keeper(optimizer)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name == _HIDDEN or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        found = getattr(self.optimizer, name)
        if name in _MOVES and callable(found):
            return functools.partial(self._moving, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers and samplers patch `step` on the instance; that must stay here, or frozen parameters would move.
        if name in _OWN or name == "step" or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __repr__(self) -> str:
        return f"MaskedOptimizer({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _OWN:
            object.__setattr__(self, name, state[name])

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the wrapped optimizer on the parameters that are not frozen, then go to the next phase.

        Args:
            closure: As in `torch.optim`; forwards before `step` (gradient accumulation) count, those of earlier calls
                of the closure do not, and every call replays the same masks.
            kwargs: Passed on.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            AttachError: If it is called in a backward.
        """
        if torch._C._current_graph_task_id() != -1:
            raise AttachError(
                f"this {type(self.optimizer).__name__} is stepped in a backward, before it is known which parameters "
                "are frozen in this step. Wrap one optimizer over all parameters and step it after the backward"
            )
        if closure is not None:
            return self._step_with_closure(closure, **kwargs)
        frozen = self._hide()
        kept = self._keeper.keep([p for p, _ in self._hidden])
        try:
            if any(group.get("fused") for group in self.optimizer.param_groups):
                _complete_momentum(self.optimizer)
            result = self.optimizer.step(**kwargs)
        finally:
            kept.put_back(frozen)
            self._show()
        self._stepped(frozen, kept)
        return result

    def _step_with_closure(self, closure: Callable[[], Any], **kwargs: Any) -> Any:
        run, frozen = self._run, frozenset[int]()
        before = set(run.step.forwards)
        kept, called = self._keeper.keep([]), False

        def evaluate() -> Any:
            nonlocal frozen, kept, called
            kept.put_back(frozen)
            self._show()
            run.evaluates(before)
            loss = closure()
            frozen = self._hide()
            if not called:  # before which optimizers move nothing
                kept, called = self._keeper.keep([p for p, _ in self._hidden]), True
            return loss

        try:
            result = self.optimizer.step(evaluate, **kwargs)
        finally:
            kept.put_back(frozen)
            self._show()
        self._stepped(frozen, kept)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a wrapped or of a plain optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def parameters(self) -> list[Tensor]:
        """Those of all groups of the wrapped optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _hide(self) -> frozenset[int]:
        """Take the gradients of frozen parameters away; the ids of these."""
        frozen = self._run.settle()
        hidden = [p for group in self.optimizer.param_groups for p in group["params"] if id(p) in frozen]
        self._hidden.extend((p, p.grad) for p in hidden)
        for parameter in hidden:
            parameter.grad = None
        return frozen

    def _show(self) -> None:
        """Put hidden gradients back."""
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()

    def _stepped(self, frozen: frozenset[int], kept: Kept) -> None:
        """The wrapped optimizer has stepped, with these parameters frozen."""
        run = self._run
        if moved := kept.lost(frozen):
            run.watch.warn(
                "moves",
                f"this {type(self.optimizer).__name__} has written to {moved} frozen parameters, which have no "
                "gradient, as it had not done in its first steps. From the next step on they are put back",
            )
        run.stepped(self, frozen)
        if kept.touched:
            run.watch.forget()  # what was moved and put back was not moved by somebody else

    def _moving(self, move: Callable[[], Any]) -> Any:
        result = move()
        self._run.watch.forget()
        return result


def _complete_momentum(optimizer: Optimizer) -> None:
    """Give late comers a momentum buffer of zeros.

    Fused SGD allocates buffers only when no parameter has one, and fails on a parameter that gets its first gradient
    after the others, as one does whose branch was frozen in the first step. With dampening that gradient is dampened
    too, where SGD that is not fused takes a first one whole.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"]:
            states = [(p, optimizer.state[p]) for p in group["params"] if p.grad is not None]
            lacking = [(p, state) for p, state in states if state.get("momentum_buffer") is None]
            if len(lacking) < len(states):
                for parameter, state in lacking:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def _delegated(name: str) -> Any:
    def method(self: MaskedOptimizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    return method


# Hooks belong to the wrapped optimizer, whose methods call them.
for _name in dir(Optimizer):
    if _name.startswith("register_"):
        setattr(MaskedOptimizer, _name, _delegated(_name))
