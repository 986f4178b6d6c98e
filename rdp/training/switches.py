"""Compiled parts of a model in batch mode: how the gates of a part are switched chooses among a few graphs.

A branch is kept or dropped as a whole there, so its gate does one of a few things, and none of them needs a mask. Torch
guards the `Switch` that says which, and makes a graph for each combination in the part that it compiles. What is
dropped, or learns nothing, is dead code in that graph. Nothing in it says which branch it is of, so that parts that are
alike share their graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rdp.phases import Phase
from rdp.training import gates

if TYPE_CHECKING:
    from rdp.training.run import Run
    from rdp.training.step import Forward

MOST = 2
"""How many gates of one graph are switched: DROP and FREEZE make 7 graphs of two, 8 with `scale_by_keep`, and 8 is
what torch makes of one function before it runs it in Python."""


@dataclass(eq=False)
class Switch:
    """What the gates and cuts of a branch do in the present forward, for a compiler to guard.

    Attributes:
        does: Phase, and whether the branch is kept, as `gates.gate` takes them; None: nothing.
        cuts: Do cuts stop gradients?
        dense: Is a mask applied instead?
        keep_prob: With `scale_by_keep`, what is divided by, `Tensor[]`: were it a number, each rate had its graphs.
        reached: Was a gate called in this forward? Set by compiled code.
    """

    does: tuple[Phase, bool] | None = None
    cuts: bool = False
    dense: bool = False
    keep_prob: Tensor | None = None
    reached: bool = False


def turn(run: Run, forward: Forward, keep_probs: Tensor | None) -> None:
    """A forward begins, or a part of it is about to be run again: this is what its gates do."""
    gated = forward.phase in run.gated_phases
    for branch, rows in enumerate(forward.kept):
        switch, kept, plain = run.switches[branch], rows > 0, branch in forward.plain
        acts = gated and not plain and gates.acts(forward.phase, kept, keep_probs is not None)
        switch.does = (forward.phase, kept) if acts else None
        switch.cuts = forward.phase is Phase.FREEZE and kept and not plain
        switch.dense = run.watch.crowded or branch in run.in_graph
        switch.keep_prob = keep_probs[branch] if keep_probs is not None else None
        switch.reached = False


def reached(run: Run) -> set[int]:
    """The branches whose gates were called by compiled code since `turn`."""
    return {branch for branch, switch in run.switches.items() if switch.reached}
