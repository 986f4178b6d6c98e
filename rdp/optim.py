"""An optimizer that leaves frozen parameters alone and tells the handle when a step is over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from rdp.errors import ArgumentError

if TYPE_CHECKING:
    from rdp.handle import ResidualDropPath

_OWN = frozenset({"optimizer", "handle"})
_MOVES = frozenset({"train", "eval"})  # of schedule-free optimizers: from one average of the parameters to another
_SCALES = "_step_supports_amp_scaling"


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

    _may_be_skipped = False

    def __init__(self, optimizer: Optimizer, handle: ResidualDropPath) -> None:
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
        self.handle = handle

    def __getattr__(self, name: str) -> Any:
        if name == _SCALES:
            # Without this attribute GradScaler unscales and checks for inf itself and calls `step` only when there is
            # none; with it, fused optimizers would be stepped, and the phase advanced, regardless. It is about to do
            # one or the other: if no `step` comes, the gradients of the step had an inf.
            self._may_be_skipped = True
            raise AttributeError(name)
        if name in _OWN or (name.startswith("__") and name.endswith("__")):
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
        return {"optimizer": self.optimizer, "handle": self.handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _OWN:
            object.__setattr__(self, name, state[name])

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the wrapped optimizer on the parameters that are not frozen, then go to the next phase.

        Args:
            closure: As in `torch.optim`; each call begins anew where the step stood when `step` was called, so forwards
                before it (gradient accumulation) count, and every call replays the same masks.
            kwargs: Passed on.

        Returns:
            What the wrapped optimizer returns.
        """
        run = self.handle._run
        if closure is None:
            run.agree()
        frozen: frozenset[int] | None = None
        hidden: list[tuple[Tensor, Tensor | None]] = []
        # LBFGS moves all parameters along one direction, whether they have a gradient or not.
        before = [(p, p.detach().clone()) for p in self.parameters()] if isinstance(self.optimizer, LBFGS) else []
        position = run.position()
        self._may_be_skipped = False

        def hide() -> None:
            nonlocal frozen
            frozen = run.frozen_parameters()
            hidden.extend((p, p.grad) for p in self.parameters() if id(p) in frozen)
            for parameter, _ in hidden:
                parameter.grad = None

        @torch.no_grad()
        def put_back() -> None:
            for parameter, old in before:
                if id(parameter) in (frozen or ()):
                    parameter.copy_(old)

        def evaluate() -> Any:
            put_back()
            _show(hidden)
            run.restart_step(position)
            assert closure is not None
            loss = closure()
            run.agree()
            hide()
            return loss

        try:
            if closure is None:
                hide()
            _complete_momentum(self.optimizer)
            result = self.optimizer.step(**kwargs) if closure is None else self.optimizer.step(evaluate, **kwargs)
        finally:
            put_back()
            _show(hidden)
        run.stepped(self, frozen)
        if before:
            run.watch.forget()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; forwards whose gradients are thrown away no longer count for the step."""
        self.handle._run.forget_finished()
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

    def skipped(self) -> bool:
        """Has a GradScaler withheld a step since the last call of this, because gradients had an inf?"""
        skipped, self._may_be_skipped = self._may_be_skipped, False
        return skipped

    def _moving(self, move: Callable[[], Any]) -> Any:
        result = move()
        self.handle._run.watch.forget()
        return result


def _show(hidden: list[tuple[Tensor, Tensor | None]]) -> None:
    """Put hidden gradients back."""
    for parameter, gradient in hidden:
        parameter.grad = gradient
    hidden.clear()


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
