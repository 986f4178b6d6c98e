"""Which phase an optimizer step belongs to: pure arithmetic on the number of steps taken."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Literal

from rdp.errors import ArgumentError


class Phase(enum.Enum):
    """What a step does with the branches.

    Source: Algorithm 1 of Park (2024), https://arxiv.org/abs/2411.09475
    """

    DROP = "drop"
    """`y = shortcut(x) + m * F(x)` with freshly drawn masks `m`."""
    FREEZE = "freeze"
    """`y = shortcut(x) + m * stop_gradient(F(x)) + (1 - m) * F(x)` with the masks of the latest DROP step."""
    PLAIN = "plain"
    """`y = shortcut(x) + F(x)`; everything learns."""


PhaseName = Literal["drop", "freeze", "plain"]


class Schedule:
    """A sequence of phases that repeats for ever.

    Args:
        phases: At least one `Phase`, or its name. FREEZE replays the latest DROP, so the first FREEZE must come after
            a DROP.

    Raises:
        ArgumentError: If `phases` is empty, holds something else, or has FREEZE before any DROP.
    """

    def __init__(self, phases: Iterable[Phase | PhaseName]) -> None:
        if isinstance(phases, (Phase, str, bytes)) or not isinstance(phases, Iterable):
            raise ArgumentError(f"phases must be a sequence of rdp.Phase, such as (rdp.Phase.DROP,); got {phases!r}")
        self.phases = tuple(_phase(phase) for phase in phases)
        if not self.phases:
            raise ArgumentError("phases is empty; the paper's sequence is (rdp.Phase.DROP, rdp.Phase.FREEZE)")
        if Phase.FREEZE in self.phases and Phase.DROP not in self.phases[: self.phases.index(Phase.FREEZE)]:
            raise ArgumentError(
                f"phases {[p.name for p in self.phases]} has FREEZE before any DROP; "
                "FREEZE replays the masks of the latest DROP, so put a DROP first"
            )

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase and the cycle of optimizer step number `step`, counted from 0.

        The cycle is the number of DROP steps before the one whose masks hold; 0 before the first DROP.
        """
        rounds, offset = divmod(step, len(self.phases))
        drops = rounds * self.phases.count(Phase.DROP) + self.phases[: offset + 1].count(Phase.DROP)
        return self.phases[offset], max(drops - 1, 0)

    def drop_of(self, step: int) -> int:
        """The number of the DROP step whose masks hold at optimizer step number `step`; 0 before the first."""
        if Phase.DROP not in self.phases:
            return 0
        return next((drop for drop in range(step, -1, -1) if self.phases[drop % len(self.phases)] is Phase.DROP), 0)


def _phase(phase: object) -> Phase:
    if isinstance(phase, Phase):
        return phase
    if isinstance(phase, str) and phase.lower() in {known.value for known in Phase}:
        return Phase(phase.lower())
    names = ", ".join(repr(known.value) for known in Phase)
    raise ArgumentError(f"phases must hold rdp.Phase members or their names, {names}; got {phase!r}")
