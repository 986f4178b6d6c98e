"""Watches a training loop from outside: every forward of the attached model and every step of the inner optimizer.

What must be true of any loop is checked by `Recorder.check`, from the masks and the parameters alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from laws.training import identical, snapshot
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import rdp


@dataclass
class Step:
    """One step of the inner optimizer."""

    phase: rdp.Phase
    masks: list[Tensor]
    """Of each training forward since the step before."""
    before: dict[str, Any]
    """Each parameter with its optimizer state."""
    after: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, float | None] = field(default_factory=dict)
    """The largest magnitude of each gradient that the inner optimizer sees; None is a hidden one."""

    @property
    def moved(self) -> set[str]:
        """The parameters that are not what they were, or whose state is not."""
        return {name for name, old in self.before.items() if not identical(old, self.after[name])}


class Recorder:
    """Records the model that is attached, and the optimizer that steps it, while it is active."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handle: rdp.ResidualDropPath | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        """The inner one, since its first step."""
        self.steps: list[Step] = []
        self.evaluations = 0
        self.arguments: dict[str, Any] = {}
        """Of `rdp.attach`, instead of the example's own."""
        self._masks: list[Tensor] = []
        self._latest: Tensor | None = None
        self._attach = rdp.attach
        monkeypatch.setattr(rdp, "attach", self._spied_attach)

    def __enter__(self) -> Recorder:
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _spied_attach(self, model: nn.Module, *args: Any, **kwargs: Any) -> rdp.ResidualDropPath:
        self.handle = self._attach(model, *args, **(kwargs | self.arguments))
        self.steps, self._masks, self._latest = [], [], None
        model.register_forward_hook(self._after_forward)
        next(model.parameters()).register_post_accumulate_grad_hook(self._fill_gradients)
        return self.handle

    def _fill_gradients(self, *_: Any) -> None:
        """Zeros where there is no gradient, as DistributedDataParallel and `set_to_none=False` leave them.

        They move a parameter by momentum and weight decay unless they are hidden from the optimizer.
        """
        for p in self.handle.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, *_: Any) -> None:
        if model is not self.handle.model:
            return  # a copy, such as an average of the weights
        masks = self.handle.masks
        if model.training and torch.is_grad_enabled():
            self._masks.append(masks)
            self._latest = masks
        elif self._latest is not None:
            self.evaluations += 1
            assert identical(masks, self._latest), "an evaluation has drawn masks"

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert not isinstance(optimizer, rdp.MaskedOptimizer)
        self.optimizer = optimizer
        self.steps.append(Step(self.handle.phase, [], snapshot(self.handle.model, optimizer)))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        step = self.steps[-1]
        step.masks, self._masks = self._masks, []  # closures run forwards within the step
        step.after = snapshot(self.handle.model, optimizer)
        named = self.handle.model.named_parameters()
        step.gradients = {name: None if p.grad is None else p.grad.abs().max().item() for name, p in named}

    def frozen(self, step: Step) -> set[str]:
        """The parameters that no row of the step reaches with gradient, by the definition of DROP and FREEZE."""
        masks = torch.cat(step.masks, dim=1)
        learning = masks if step.phase is rdp.Phase.DROP else ~masks
        inside: set[str] = set()
        reached: set[str] = set()
        for branch, rows in zip(self.handle.branches, learning, strict=True):
            inside.update(branch.parameters)
            if branch.rate == 0 or rows.any():
                reached.update(branch.parameters)
        return inside - reached

    def forget_forwards(self) -> None:
        """The gradients since the last step were thrown away."""
        self._masks = []

    def check(self, steps: int, accumulate: int = 1, evaluations: int = 0) -> None:
        """What must be true of any training loop.

        Args:
            steps: How many optimizer steps it took.
            accumulate: How many forwards each of them had.
            evaluations: How many forwards in eval mode there were at least.
        """
        assert len(self.steps) == self.handle.step_count == steps
        assert self.evaluations >= evaluations
        alternating = [rdp.Phase.FREEZE if n % 2 else rdp.Phase.DROP for n in range(steps)]
        assert [step.phase for step in self.steps] == alternating, "phases alternate, once an optimizer step"
        assert [len(step.masks) for step in self.steps] == [accumulate] * steps
        self._check_masks()
        self._check_frozen()
        checkup = self.handle.check()
        assert checkup.ok, str(checkup)

    def _check_masks(self) -> None:
        """FREEZE replays the masks of DROP, forward by forward; the forwards of one step differ, and so do cycles."""
        drops = [step for step in self.steps if step.phase is rdp.Phase.DROP]
        for drop, freeze in zip(self.steps[::2], self.steps[1::2], strict=False):
            assert identical(drop.masks, freeze.masks)
        drawn = [tuple(mask.flatten().tolist()) for step in drops for mask in step.masks]
        assert len(set(drawn)) > len(drawn) / 2

    def _check_frozen(self) -> None:
        frozen_in = {rdp.Phase.DROP: 0, rdp.Phase.FREEZE: 0}
        for number, step in enumerate(self.steps):
            frozen = self.frozen(step)
            frozen_in[step.phase] += len(frozen)
            assert not step.moved & frozen, f"frozen parameters moved in step {number} ({step.phase.name})"
            assert all(step.gradients[name] is None for name in frozen)
            stood = {n for n in step.before.keys() - frozen - step.moved if step.gradients[n] != 0}
            assert not stood, f"live parameters stood in step {number} ({step.phase.name})"
        if self.handle.options.mode == "batch":  # by rows, some row of a batch nearly always learns
            assert min(frozen_in.values()) > 0, "the run froze nothing, so it shows nothing"


def outcome(handle: rdp.ResidualDropPath, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """All that a run leaves behind, to compare two runs bit by bit."""
    return dict(handle.model.state_dict()), snapshot(handle.model, optimizer), handle.state_dict()
