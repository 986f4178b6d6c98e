"""Watching an attached model in training: what was reached, what has moved, and the warnings of the first steps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from torch import nn

from rdp.branches import Branch
from rdp.errors import warn
from rdp.phases import Phase
from rdp.slots import Slot, present

_PROBES = 8


class Watch:
    """Counts what happens to the model between one forward and the next; it changes nothing.

    Args:
        model: The attached model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0
        self.reached: set[int] = set()
        self.compiled = False
        """Has a compiled graph begun a forward? What it reaches cannot be seen."""
        self.known: frozenset[str] = frozenset()
        """Names of the parameters that there were when the branches were found."""
        self.moved: dict[str, int] = {}
        """Names of parameters that moved although they were frozen, with the number of the step."""
        self.warned: set[str] = set()
        self._watched: list[Slot] = []
        self._probes: list[Slot] = []
        self._versions: list[int | None] | None = None  # None for a parameter that is not there any more
        self._frozen: frozenset[int] = frozenset()
        self._announced = True
        self._unannounced = 0

    def found(self, branches: Iterable[Branch], places: Mapping[str, Slot]) -> None:
        """The branches are known; `places` are those of all parameters."""
        self.known = frozenset(places)
        parameters = dict(self.model.named_parameters())
        inside = {name for branch in branches for name in branch.parameters}
        outside = [places[name] for name, p in parameters.items() if name not in inside and p.requires_grad]
        # Of what learns in every step a few are enough; parameters are registered from stem to head.
        half = _PROBES // 2
        self._probes = (outside[:half] + outside[-half:]) or list(places.values())[:_PROBES]
        self._watched = [places[name] for name in parameters if name in inside or places[name] in self._probes]

    def gradients(self) -> Hashable:
        """The state of the model's gradients; it changes when a backward runs and when they are cleared."""
        return tuple(None if p.grad is None else (id(p.grad), p.grad._version) for p in present(self._probes))

    def has_no_gradients(self) -> bool:
        """Have the model's gradients been cleared, or none been made?"""
        return all(p.grad is None for p in present(self._probes))

    def forward_begins(self, phase: Phase, step: int, in_step: bool) -> None:
        """A training forward begins; `in_step` says that some, but not all optimizers have stepped."""
        self.forwards += 1
        parameters = [slot.parameter for slot in self._watched]
        versions = [None if p is None else p._version for p in parameters]
        if self._versions is not None and versions != self._versions:
            self._look(versions, phase, step, in_step)
        self._versions, self._announced, self._frozen = versions, False, frozenset()

    def step_ends(self, frozen: frozenset[int]) -> None:
        """The step was announced, with these parameters, by id, frozen in it."""
        self._announced, self._unannounced, self._frozen = True, 0, frozen

    def forget(self) -> None:
        """Parameters are about to move for good reasons: an optimizer evaluates a closure, a state is loaded."""
        self._versions = None

    def warn(self, key: str, text: str) -> None:
        """Warn of each thing once."""
        if key not in self.warned:
            self.warned.add(key)
            warn(text)

    def _look(self, versions: Sequence[int | None], phase: Phase, step: int, in_step: bool) -> None:
        pairs = zip(self._watched, self._versions or (), versions, strict=True)
        changed = [slot for slot, old, new in pairs if old != new]
        if self._announced:
            self.moved |= {slot.name: step - 1 for slot in changed if id(slot.parameter) in self._frozen}
        elif not in_step:
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
