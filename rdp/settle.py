"""Branches that hold what is promised of them: chosen, hooked and proved, and chosen again without what was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rdp import choose
from rdp.calls import Inputs
from rdp.discovery.forwards import initialise
from rdp.known import Known
from rdp.native import NativeDrop
from rdp.proof import BUDGET, Proof, prove
from rdp.training.replaced import Places
from rdp.training.run import Run
from rdp.training.state import check_branches


@dataclass(frozen=True)
class Settled:
    """The branches of a run, hooked."""

    choice: choose.Choice
    places: Places
    proof: Proof
    silenced: tuple[NativeDrop, ...]
    """What dropped paths by itself, and does not any more."""


def settle(run: Run, inputs: Inputs) -> Settled:
    """Find the branches of a run's model, hook them and prove them; if anything fails, all is as before.

    Args:
        run: It has no branches yet, and counts no forward while this goes on.
        inputs: Of a forward.

    Raises:
        RdpError: What `choose_branches` raises, and if a loaded state is of other branches.
    """
    model, options, expected = run.model, run.options, run.expected
    known = Known()
    with _all_or_nothing(run) as (silenced, hooked):
        with torch.inference_mode(False), run.paused():
            initialise(model, inputs)
        while True:
            with torch.inference_mode(False), run.paused():
                choice = choose.choose_branches(model, options, *inputs, known)
            silenced += choice.silenced
            places = Places(run, choice.branches, choice.programs)
            hooked.append(places)
            run.rows = choice.rows
            run.found(choice.branches)
            proof = prove(run, inputs, BUDGET) if options.verify else Proof({}, "verify=False")
            if not known.learn(proof, choice.programs):
                break
            hooked.pop().remove()
        run.expected = expected
        check_branches(run, choice.branches)
        places.begin()
    return Settled(choice, places, proof, tuple(silenced))


@contextmanager
def _all_or_nothing(run: Run) -> Iterator[tuple[list[NativeDrop], list[Places]]]:
    """What was silenced and hooked within is taken back if an error leaves it."""
    silenced: list[NativeDrop] = []
    hooked: list[Places] = []
    expected = run.expected
    try:
        yield silenced, hooked
    except BaseException:
        for places in hooked:
            places.remove()
        run.found(())
        for drop in silenced:
            drop.restore()
        run.expected = expected
        raise
