"""Where training stands: which step, which forward of it, which masks. No hooks and no model in here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdp import masks
from rdp.branches import Branch
from rdp.errors import StateError
from rdp.masks import Mode
from rdp.phases import Phase, Schedule


@dataclass
class _Counted:
    """A forward that counts for the current step."""

    draw: int
    """Number of its masks within the cycle."""
    live: Tensor
    """Bool `Tensor[branches]`: does some row reach the loss through the branch, with gradient?"""
    gradients: Hashable
    """The state of the model's gradients when it began; once they differ, its backward has run."""


class Progress:
    """The counters of a run, and the masks that follow from them.

    A *cycle* is a DROP step with the FREEZE steps that replay it. Within a step the forwards (micro-batches) are
    numbered; FREEZE gives its forward k the masks of DROP's forward k.

    Args:
        schedule: The sequence of phases.
        branches: The branches, with their rates.
        seed: Of the mask stream.
        mode: "row" or "batch".
        one_draw: Use the same masks in all forwards of a step.
    """

    def __init__(
        self, schedule: Schedule, branches: Sequence[Branch], *, seed: int, mode: Mode, one_draw: bool
    ) -> None:
        self.schedule = schedule
        self.branches = tuple(branches)
        self.seed = seed
        self.mode = mode
        self.one_draw = one_draw
        self.step_count = 0
        self.masks = torch.ones(len(self.branches), 0, dtype=torch.bool)
        self._counted: list[_Counted] = []
        self._replayed: list[int] = []  # the draws of the latest DROP step, in order
        self._ungated = torch.tensor([b.rate == 0 for b in self.branches], dtype=torch.bool)

    @property
    def phase(self) -> Phase:
        """The phase of the current step."""
        return self.schedule.phase(self.step_count)

    @property
    def forwards(self) -> int:
        """How many forwards count for the current step so far."""
        return len(self._counted)

    def begin_forward(self, rows: int, rank: int = 0, ranks: int = 1, gradients: Hashable = None) -> Tensor:
        """Start a forward of `rows` rows and return its masks, bool `Tensor[branches, rows]`."""
        number = self._next_draw()
        self.masks = self._draw(rows, number, rank)
        self._counted.append(_Counted(number, self._live(rows, number, rank, ranks), gradients))
        return self.masks

    def live(self) -> Tensor:
        """Bool `Tensor[branches]`: the branches that learn in the current step."""
        if not self._counted:
            return torch.ones(len(self.branches), dtype=torch.bool)
        return torch.stack([counted.live for counted in self._counted]).any(0)

    def advance(self) -> None:
        """End the current step."""
        if self.phase is Phase.DROP:
            self._replayed = [counted.draw for counted in self._counted]
        self._counted = []
        self.step_count += 1

    def forget_forwards(self, gradients: Hashable = None) -> None:
        """The gradients of the current step are thrown away, and with them the forwards that made them.

        Args:
            gradients: The state of the model's gradients; forwards that began in just this state have not had their
                backward yet and still count. None forgets all.
        """
        self._counted = [c for c in self._counted if gradients is not None and c.gradients == gradients]

    def state_dict(self) -> dict[str, Any]:
        """Counters and masks, as plain numbers and tensors."""
        return {
            "branches": [branch.name for branch in self.branches],
            "rates": [branch.rate for branch in self.branches],
            "phases": [phase.value for phase in self.schedule.phases],
            "mode": self.mode,
            "seed": self.seed,
            "step_count": self.step_count,
            "draws": [counted.draw for counted in self._counted],
            "live": [counted.live.clone() for counted in self._counted],
            "replayed": list(self._replayed),
            "masks": self.masks.clone(),
        }

    def check(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return `state` if it has the form of a state dict, whatever model it is of."""
        if not isinstance(state, dict):
            raise StateError(f"this is no state of a ResidualDropPath handle, but a {type(state).__name__}")
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise StateError(f"this is no state of a ResidualDropPath handle: it lacks {sorted(missing)}")
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Raises:
            StateError: If a key is missing, or the state is of other branches, rates, phases or another mode.
        """
        mine = self.state_dict()
        self.check(state)
        for key in ("branches", "rates", "phases", "mode"):
            if key in ("branches", "rates") and not state["branches"]:
                continue  # saved before the branches were found
            if mine[key] != state[key]:
                raise StateError(
                    f"the state was saved with other {key} than this handle has: {_shorten(state[key])} in the state, "
                    f"{_shorten(mine[key])} here. Attach with the arguments of the saved run"
                )
        self.seed = int(state["seed"])
        self.step_count = int(state["step_count"])
        self._counted = [
            _Counted(int(draw), live.clone().cpu(), None)
            for draw, live in zip(state["draws"], state["live"], strict=True)
        ]
        self._replayed = [int(draw) for draw in state["replayed"]]
        if state["branches"]:
            self.masks = state["masks"].clone().cpu()

    def _next_draw(self) -> int:
        if self.one_draw:
            return 0
        if self.phase is Phase.FREEZE and self._replayed:
            return self._replayed[self.forwards % len(self._replayed)]
        return max((counted.draw + 1 for counted in self._counted), default=0)

    def _draw(self, rows: int, number: int, rank: int) -> Tensor:
        if self.phase is Phase.PLAIN:
            return torch.ones(len(self.branches), rows, dtype=torch.bool)
        rates = [branch.rate for branch in self.branches]
        cycle = self.schedule.cycle(self.step_count)
        return masks.draw(rates, rows, seed=self.seed, cycle=cycle, micro_batch=number, mode=self.mode, rank=rank)

    def _live(self, rows: int, number: int, rank: int, ranks: int) -> Tensor:
        """Which branches learn on any rank; every rank comes to the same answer without asking the others."""
        live = self._learning_rows(self.masks).any(1)
        others = (r for r in range(ranks) if r != rank) if self.mode == "row" else ()
        for other in others:
            if bool(live.all()):
                break
            live = live | self._learning_rows(self._draw(rows, number, other)).any(1)
        return live

    def _learning_rows(self, keep: Tensor) -> Tensor:
        """Bool `Tensor[branches, rows]`: the rows that have a gradient through the branch."""
        learning = ~keep if self.phase is Phase.FREEZE else keep.clone()
        learning |= self._ungated[:, None]
        for index in sorted(range(len(self.branches)), key=self._nesting):
            around = self.branches[index].inside
            if around is not None:
                learning[index] &= learning[around]
        return learning

    def _nesting(self, index: int) -> int:
        around = self.branches[index].inside
        return 0 if around is None else 1 + self._nesting(around)


def _shorten(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
