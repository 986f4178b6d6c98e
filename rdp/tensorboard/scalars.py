"""The numbers of training steps, gathered without waiting for the device and given out at the ends of cycles.

A point is of whole cycles of phases: one number that can be compared with other algorithms', and one for each phase.
Between points, values stay where they were computed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from rdp.handle import ResidualDropPath
from rdp.phases import Phase
from rdp.tensorboard.tags import BY_PHASE, of_phase


class Scalars:
    """Gathers what `Panels.log` is told.

    Args:
        handle: Of the model.
        every: Steps between two points; rounded up to whole cycles. The first one comes after the first cycle.
    """

    def __init__(self, handle: ResidualDropPath, every: int) -> None:
        self._handle = handle
        self._phases = handle.options.phases
        self._cycle = len(self._phases)
        self._interval = math.ceil(every / self._cycle) * self._cycle
        self._left = self._cycle
        self._sums: dict[tuple[str, Phase], Tensor | float] = defaultdict(float)
        self._counts: dict[tuple[str, Phase], int] = defaultdict(int)

    def step(self, metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Take in a step between its backward and `optimizer.step()`.

        Args:
            metrics: By tag.

        Returns:
            The numbers of a point, by tag, if one is due; nothing otherwise.
        """
        phase = self._handle.phase
        for tag, value in metrics.items():
            self._add(tag, phase, value)
        if self._left <= self._cycle:  # once a point: each phase of its last cycle
            self._add("train/gradient_norm", phase, _gradient_norm(self._handle))
            self._add("rdp/learning_rows", phase, 100 * learning_rows(self._handle))
            live, frozen = parameter_counts(self._handle)
            self._add("rdp/frozen_parameters", phase, 100 * frozen / max(live + frozen, 1))
        self._left -= 1
        return {} if self._left else self._point()

    def _add(self, tag: str, phase: Phase, value: float | Tensor) -> None:
        self._sums[tag, phase] = self._sums[tag, phase] + (
            value.detach().float() if isinstance(value, Tensor) else value
        )
        self._counts[tag, phase] += 1

    def _point(self) -> dict[str, float]:
        sums = {key: float(value) for key, value in self._sums.items()}
        tags = dict.fromkeys(tag for tag, _ in sums)
        numbers = {}
        for tag in tags:
            phases = [phase for phase in Phase if (tag, phase) in sums]
            count = sum(self._counts[tag, phase] for phase in phases)
            numbers[tag] = sum(sums[tag, phase] for phase in phases) / count
            if tag in BY_PHASE and len(set(self._phases)) > 1:
                numbers |= {of_phase(tag, phase): sums[tag, phase] / self._counts[tag, phase] for phase in phases}
        self._sums.clear()
        self._counts.clear()
        self._left = self._interval
        drops = Phase.DROP in self._phases  # else rates are there, and nothing is dropped
        return numbers | {"rdp/rate": max(self._handle.rates) if drops else 0.0}


def parameter_counts(handle: ResidualDropPath) -> tuple[int, int]:
    """How many numbers may move in the current step, and how many stay frozen because no row reached the loss through
    them: those of branches that were dropped for all rows (DROP) or for none (FREEZE).

    Returns:
        (live, frozen); together the parameters that require gradients.
    """
    frozen_names = set(handle.frozen)
    sizes = {name: p.numel() for name, p in handle.model.named_parameters() if p.requires_grad}
    frozen = sum(size for name, size in sizes.items() if name in frozen_names)
    return sum(sizes.values()) - frozen, frozen


def learns(handle: ResidualDropPath) -> Tensor:
    """Which branches learn from which rows of the latest forward, bool `Tensor[branches, rows]`, on the CPU."""
    masks = handle.masks
    if handle.phase is Phase.PLAIN:
        return torch.ones_like(masks)
    plain = torch.tensor([rate == 0 for rate in handle.rates])
    return (masks if handle.phase is Phase.DROP else ~masks) | plain[:, None]


def learning_rows(handle: ResidualDropPath) -> float:
    """The share of the pairs of a row and a branch, in the latest forward, in which the branch learns from the row."""
    learning = learns(handle)
    return learning.float().mean().item() if learning.numel() else 1.0


def _gradient_norm(handle: ResidualDropPath) -> float | Tensor:
    norms = [p.grad.detach().float().norm() for p in handle.model.parameters() if p.grad is not None]
    return torch.stack(norms).norm() if norms else 0.0
