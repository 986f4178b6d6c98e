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
from rdp.masks import Mode, Sampling
from rdp.phases import Phase, Schedule

_LAST_STEP = 2**62  # masks are drawn by 64-bit integers


@dataclass(frozen=True)
class Draw:
    """Which masks a forward has: with the seed and the cycle, all that it takes to draw them again."""

    number: int
    """Of the forward within the DROP step that was first to use them."""
    rows: int
    """How many rows that forward had."""


@dataclass
class _Counted:
    """A forward that counts for the current step."""

    draw: Draw
    rows: int
    masks: Tensor
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
        sampling: "bernoulli" or "fixed".
        one_draw: Use the same masks in all forwards of a step.
    """

    def __init__(
        self,
        schedule: Schedule,
        branches: Sequence[Branch],
        *,
        seed: int,
        mode: Mode,
        sampling: Sampling = "bernoulli",
        one_draw: bool = False,
    ) -> None:
        self.schedule = schedule
        self.branches = tuple(branches)
        self.seed = seed
        self.mode = mode
        self.sampling = sampling
        self.one_draw = one_draw
        self.step_count = 0
        self.masks = torch.ones(len(self.branches), 0, dtype=torch.bool, device="cpu")
        self._rates = [branch.rate for branch in self.branches]
        self._counted: list[_Counted] = []
        self._replayed: list[Draw] = []  # of the latest DROP step, in order
        self._ungated = torch.tensor([rate == 0 for rate in self._rates], dtype=torch.bool, device="cpu")
        nested = [(i, branch.inside) for i, branch in enumerate(self.branches) if branch.inside is not None]
        self._nested = sorted(nested, key=lambda pair: self._depth(pair[0]))

    @property
    def phase(self) -> Phase:
        """The phase of the current step."""
        return self.schedule.phase(self.step_count)

    @property
    def forwards(self) -> int:
        """How many forwards count for the current step so far."""
        return len(self._counted)

    def begin_forward(self, rows: int, rank: int = 0, gradients: Hashable = None) -> Tensor:
        """Start a forward of `rows` rows and return its masks, bool `Tensor[branches, rows]`."""
        draw = self._next_draw(rows)
        self.masks = self._draw(draw, rows, rank)
        self._counted.append(_Counted(draw, rows, self.masks, self._live(self.masks), gradients))
        return self.masks

    def live(self) -> Tensor:
        """Bool `Tensor[branches]`: the branches that learn in the current step, as far as this rank can tell."""
        if not self._counted:
            return torch.ones(len(self.branches), dtype=torch.bool, device="cpu")
        return torch.stack([counted.live for counted in self._counted]).any(0)

    def advance(self) -> None:
        """End the current step."""
        if self.phase is Phase.DROP:
            self._replayed = [counted.draw for counted in self._counted]
        self._counted = []
        self.step_count += 1

    def skip_to(self, step: int) -> None:
        """Go to a later step that other ranks have reached; does nothing where it is not later."""
        if step > self.step_count:
            # What they drew in DROP is not known, but forward k has draw k unless one was thrown away.
            self.step_count, self._counted, self._replayed = step, [], []

    def forget_finished(self, gradients: Hashable) -> None:
        """The gradients of the current step are thrown away, and with them the forwards that made them.

        Args:
            gradients: The state of the model's gradients; forwards that began in just this state have not had their
                backward yet and still count.
        """
        self._counted = [c for c in self._counted if c.gradients == gradients]

    def take_back(self, masks: Tensor) -> None:
        """The forward that began with `masks` has raised: it does not count, and the next one gets its masks."""
        self._counted = [c for c in self._counted if c.masks is not masks]

    def counted(self) -> list[_Counted]:
        """The forwards that count for the current step, for `count`."""
        return list(self._counted)

    def count(self, forwards: list[_Counted]) -> None:
        """Let these forwards count, and no others."""
        self._counted = list(forwards)

    def state_dict(self) -> dict[str, Any]:
        """Counters and masks, as plain numbers and tensors."""
        return {
            "branches": [branch.name for branch in self.branches],
            "rates": list(self._rates),
            "phases": [phase.value for phase in self.schedule.phases],
            "mode": self.mode,
            "sampling": self.sampling,
            "seed": self.seed,
            "step_count": self.step_count,
            "forwards": [[c.draw.number, c.draw.rows, c.rows] for c in self._counted],
            "replayed": [[draw.number, draw.rows] for draw in self._replayed],
            "masks": self.masks.clone(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse what is no state dict, or that of another run.

        Raises:
            StateError: If a key is missing, a value is damaged, or the state is of other branches, rates, phases,
                another mode or another sampling. Branches are compared once they are known on both sides.
        """
        if not isinstance(state, dict):
            raise StateError(f"this is no state of a ResidualDropPath handle, but a {type(state).__name__}")
        mine = self.state_dict()
        missing = mine.keys() - state.keys()
        if missing:
            raise StateError(f"this is no state of a ResidualDropPath handle: it lacks {sorted(missing)}")
        if not _is_list_of(state["branches"], str):
            raise StateError(f"branches in the state is damaged: {_shorten(state['branches'])}. Load another one")
        compared = ["phases", "mode", "sampling"] + (
            ["branches", "rates"] if self.branches and state["branches"] else []
        )
        for key in compared:
            if type(mine[key]) is not type(state[key]) or mine[key] != state[key]:
                raise StateError(
                    f"the state was saved with other {key} than this handle has: {_shorten(state[key])} in the state, "
                    f"{_shorten(mine[key])} here. Attach with the arguments of the saved run"
                )
        sound = {
            "rates": _is_list_of(state["rates"], float, int) and len(state["rates"]) == len(state["branches"]),
            "seed": _is_count(state["seed"]),
            "step_count": _is_count(state["step_count"]) and state["step_count"] < _LAST_STEP,
            "forwards": _is_table(state["forwards"], 3),
            "replayed": _is_table(state["replayed"], 2),
            "masks": isinstance(state["masks"], Tensor)
            and state["masks"].dtype == torch.bool
            and state["masks"].dim() == 2
            and len(state["masks"]) == len(state["branches"]),
        }
        for key in (key for key, is_sound in sound.items() if not is_sound):
            raise StateError(f"{key} in the state is damaged: {_shorten(state[key])}. Load another one")

    def load_state_dict(self, state: dict[str, Any], rank: int = 0) -> None:
        """Continue where `state` was saved, on this or another rank.

        Raises:
            StateError: As `check` does; nothing has changed then.
        """
        self.check(state)
        self.seed, self.step_count = state["seed"], state["step_count"]
        self._replayed = [Draw(number, rows) for number, rows in state["replayed"]]
        self._counted = []
        if state["branches"] and self.branches:
            self.masks = state["masks"].clone().cpu()
            for number, drawn_rows, rows in state["forwards"]:
                draw = Draw(number, drawn_rows)
                drawn = self._draw(draw, rows, rank)
                self._counted.append(_Counted(draw, rows, drawn, self._live(drawn), None))

    def _next_draw(self, rows: int) -> Draw:
        if self.phase is Phase.FREEZE and self._replayed:
            return self._replayed[0 if self.one_draw else self.forwards % len(self._replayed)]
        if self.one_draw:
            return Draw(0, rows)
        return Draw(max((counted.draw.number + 1 for counted in self._counted), default=0), rows)

    def _draw(self, draw: Draw, rows: int, rank: int) -> Tensor:
        if self.phase is Phase.PLAIN:
            return torch.ones(len(self.branches), rows, dtype=torch.bool, device="cpu")
        return masks.draw(
            self._rates,
            rows,
            seed=self.seed,
            cycle=self.schedule.cycle(self.step_count),
            micro_batch=draw.number,
            mode=self.mode,
            rank=rank,
            fixed_among=draw.rows if self.sampling == "fixed" else None,
        )

    def _live(self, keep: Tensor) -> Tensor:
        """Bool `Tensor[branches]`: the branches that have a row with a gradient."""
        learning = ~keep if self.phase is Phase.FREEZE else keep
        if not self._nested:
            return learning.any(1) | self._ungated
        learning = learning | self._ungated[:, None]
        for inner, outer in self._nested:
            learning[inner] &= learning[outer]
        return learning.any(1)

    def _depth(self, index: int) -> int:
        around = self.branches[index].inside
        return 0 if around is None else 1 + self._depth(around)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _is_list_of(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _is_table(value: object, width: int) -> bool:
    """Is this a list of lists of `width` counts each?"""
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(row, list) and len(row) == width and all(map(_is_count, row)) for row in rows)


def _shorten(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
