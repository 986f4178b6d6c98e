"""Watching an attached model in training: what was reached, what has moved, and the warnings of the first steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from rdp.branches import Branch
from rdp.errors import listed, warn
from rdp.phases import Phase
from rdp.training.frozen import Frozen, Slot

if TYPE_CHECKING:
    from rdp.training.step import Step

Seen = tuple[list[int], list[int]]
"""Of some parameters: which objects they are, and how often each was written to."""
_GONE = id(None)


class Watch:
    """Counts what happens to the model between one forward and the next; it changes nothing.

    Args:
        model: The attached model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = self.evaluations = self.steps = self.empty = 0
        """Training forwards, calls in eval mode, steps that ended, and those of them that had no training forward."""
        self.reached: set[int] = set()
        self.traced: set[int] = set()
        """The branches that are gated in compiled code, whose calls cannot be seen one by one."""
        self.dense_in_graph = False
        """Does a graph run all rows of a branch that could run on some of them?"""
        self.whole = self.crowded = False
        """In batch mode: is the model compiled as a whole, or a part of it with too many gates to choose by?"""
        self.unseen = False
        """Are there graphs that cannot tell which branches they gate?"""
        self.known: frozenset[str] = frozenset()
        """Names of the parameters that there were when the branches were found."""
        self.learnt: dict[Phase, tuple[list[int], int]] = {}
        """In each phase, on how many rows each gated branch has learnt, and of how many."""
        self.compared = self.differing = 0
        """FREEZE steps, and those of them that had another number of forwards than their DROP step."""
        self.moved: dict[str, int] = {}
        """Names of parameters that moved although they were frozen, with the number of the step."""
        self.woken: dict[str, Branch] = {}
        """By name, branches that train, but did not when they were found."""
        self.unused: frozenset[str] = frozenset()
        """Names of parameters outside of branches that were not used when these were found, and have not learnt yet."""
        self.detour = False
        """Have some of them learnt since the model was last looked at?"""
        self.late: tuple[str, ...] = ()
        """Names of branches that run, but did not when the others were found."""
        self.warned: set[str] = set()
        self.watched: list[Slot] = []
        """The parameters that are looked at: those of branches, and some outside of them."""
        self._places: Mapping[str, Slot] = {}
        self._first: Seen | None = None  # in the first forward of all
        self._seen: Seen | None = None
        self._frozen: frozenset[int] = frozenset()
        self._announced = True
        self._unannounced = 0

    def found(self, places: Mapping[str, Slot], watched: Collection[str]) -> None:
        """The branches are known; `places` are those of all parameters, and these of them are looked at."""
        self.known, self._first, self._places = frozenset(places), None, places
        self.watched = [places[name] for name, _ in self.model.named_parameters() if name in watched]

    def forward_begins(self, phase: Phase, step: int, in_step: bool) -> None:
        """A training forward begins; `in_step` says that some, but not all optimizers have stepped."""
        self.forwards += 1
        there = [slot.holder.get(slot.key) for slot in self.watched]
        seen = _seen(there)
        if self._seen is not None and seen != self._seen:
            others = () if seen[0] == self._seen[0] else zip(there, self._seen[0], seen[0], strict=True)
            if not all(isinstance(p, nn.Parameter) for p, old, new in others if _other(old, new)):
                return  # torch.func.functional_call runs the model on other tensors, which tells nothing of these
            self._look(self._seen, seen, phase, step, in_step)
        self._first = self._first or seen
        self._seen, self._announced, self._frozen = seen, False, frozenset()

    def step_ends(self, frozen: frozenset[int]) -> None:
        """The step was announced, with these parameters, by id, frozen in it."""
        self._announced, self._unannounced, self._frozen = True, 0, frozen
        self.steps += 1
        if self.dense_in_graph:  # told now, since a warning would break a graph that is being made
            self.warn(
                "dense in graph",
                "compiled code runs all rows of every branch, since the number of undropped rows differs from one "
                'forward to the next: it learns the same and saves no work. Attach with sampling="fixed" for graphs '
                "that run some of the rows",
            )
        if self.whole:
            self.warn(
                "whole",
                "in batch mode the model is compiled as a whole, for which graphs without its dropped branches would "
                "be too many: it runs them all, learns the same and saves no work. Compile its blocks instead, each by "
                "itself: for block in model.blocks: block.compile()",
            )
        if self.crowded:
            self.warn(
                "crowded",
                "in batch mode a compiled part of the model has so many branches that graphs without the dropped ones "
                "would be too many: compiled code runs them all, learns the same and saves no work. Compile smaller "
                "parts, of one or two branches each",
            )

    def counts(self, step: Step, frozen: Frozen) -> None:
        """The step has ended: which branches have learnt in it, and on how many rows."""
        counted = [forward for forward in step.forwards if forward.used]
        for forward in step.forwards:  # of a compiled one Python sees no end
            self.reached |= forward.reached
        self.empty += all(forward.spent for forward in step.forwards)
        for forward in counted:
            before, rows = self.learnt.get(step.phase, ([0] * len(forward.kept), 0))
            learnt = frozen.rows_learning(forward.masks, forward.kept, step.phase, forward.plain)
            self.learnt[step.phase] = [a + b for a, b in zip(before, learnt, strict=True)], rows + forward.rows
        if step.phase is Phase.FREEZE and counted:
            self.compared += 1
            self.differing += len(counted) != len(step.replay)

    def notice_detour(self) -> None:
        """The step has ended: has something learnt that was not used when the branches were found?"""
        slots = {name: self._places[name] for name in self.unused & self.known}
        there = {name: slot.holder.get(slot.key) for name, slot in slots.items()}
        if learning := {name for name, p in there.items() if p is not None and p.grad is not None}:
            self.unused, self.detour = self.unused - learning, True

    def forget(self) -> None:
        """Parameters are about to move for good reasons: an optimizer evaluates a closure, a state is loaded."""
        self._seen = None

    def warn(self, key: str, text: str) -> None:
        """Warn of each thing once."""
        if key not in self.warned:
            self.warned.add(key)
            warn(text)

    def idle(self) -> None:
        """An optimizer has stepped, but no training forward can have counted for the step."""
        self.warn(
            "idle",
            "the optimizer stepped, but no gated training forward of the attached model came before it: Residual "
            "DropPath had no part in this step. Is the model in eval mode, or was only a part of it called?",
        )

    def replaced(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped whose wrapper is not in use any more."""
        self.warn(
            "replaced",
            f"this {type(optimizer).__name__} stepped, although the handle has wrapped another optimizer over some of "
            "the same parameters since, which took its place. Give each parameter to one optimizer; where several "
            "alternate, step plain ones and call handle.advance() after each step",
        )

    def stray(self, branch: str) -> None:
        """A branch was called in training, but not by a forward that is gated."""
        self.warn(
            "stray",
            f"branch `{branch}` ran outside of a forward of the attached model, so it is trained plainly. Call the "
            f"{type(self.model).__name__} itself, not its parts, or attach to the part that is called",
        )

    def wakes(self, branch: Branch) -> None:
        """A branch trains that did not when it was found."""
        self.woken.setdefault(branch.name, branch)
        self.warn(
            "woken",
            f"branch `{branch.name}` trains now, but was {branch.idle} when it was found, so it has no rate and is "
            "trained plainly, and so are others if handle.check() names them. Call handle.remove() and attach again, "
            "with everything in train mode that will train",
        )

    def come_late(self, branches: tuple[str, ...]) -> None:
        """The model has been looked at again, and has these branches besides."""
        self.detour, self.late = False, branches or self.late
        if branches:
            self.warn(
                "late",
                f"{listed([f'`{name}`' for name in branches])} did not run when the branches were found, and are "
                "trained plainly now. Call handle.remove() and attach again, when the model goes this way; what runs "
                "in training alone cannot be found",
            )

    def moving(self) -> set[str]:
        """Names of the watched parameters that have changed since the first forward."""
        if self._first is None:
            return set()
        now = _seen([slot.holder.get(slot.key) for slot in self.watched])
        pairs = zip(self.watched, zip(*self._first, strict=True), zip(*now, strict=True), strict=True)
        return {slot.name for slot, old, new in pairs if old != new}

    def _look(self, before: Seen, seen: Seen, phase: Phase, step: int, in_step: bool) -> None:
        if self._announced and not self._frozen:
            return
        each = zip(self.watched, *before, *seen, strict=True)
        # One that is another object was replaced, by FSDP or by a user, who builds an optimizer of it.
        changed = [
            slot for slot, old, written, new, now in each if (old, written) != (new, now) and not _other(old, new)
        ]
        if self._announced:
            self.moved |= {slot.name: step - 1 for slot in changed if id(slot.holder.get(slot.key)) in self._frozen}
        elif changed and not in_step:
            self._unannounced += 1
            # Once may be the climb of SAM, which moves parameters up before the step that is announced.
            if self._unannounced < 2:
                return
            self.warn(
                "unannounced",
                f"parameters have changed since the last training forward, but the phase is still {phase.name}: "
                "no step was announced, so DROP and FREEZE do not alternate. Step the optimizer that handle.wrap(...) "
                "returned, or call handle.advance() after each step",
            )


def _seen(there: Sequence[Tensor | None]) -> Seen:
    return [*map(id, there)], [-1 if p is None else p._version for p in there]


def _other(old: int, new: int) -> bool:
    """Is it another object, in place of one that was there?"""
    return old != new and _GONE not in (old, new)
