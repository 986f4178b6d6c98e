"""Watching an attached model in training: the warnings of the first steps, and the report of `handle.check()`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rdp.branches import Branch
from rdp.copies import Hook
from rdp.errors import warn
from rdp.phases import Phase
from rdp.slots import Slot, present

if TYPE_CHECKING:
    from rdp.handle import ResidualDropPath

_PROBES = 8
_LISTED = 5


@dataclass(frozen=True)
class Checkup:
    """What `ResidualDropPath.check` has found; print it.

    Attributes:
        facts: What is attached, and what has happened so far.
        problems: What is not as it should be, each with the names it concerns and the way out.
    """

    facts: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Is there no problem?"""
        return not self.problems

    def __str__(self) -> str:
        return "\n".join([*self.facts, *(f"PROBLEM: {problem}" for problem in self.problems)])


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


def check(handle: ResidualDropPath) -> Checkup:
    """Examine a handle and its model; see `ResidualDropPath.check`."""
    watch, branches = handle._run.watch, handle.branches
    gated = [b for b in branches if b.rate > 0]
    refused = f", {len(handle.refused)} sums not gated" if handle.refused else ""
    facts = (
        f"{type(handle.model).__name__}: {len(gated)} gated branches of {len(branches)}{refused}",
        f"{watch.forwards} training forwards, {handle.step_count} steps; the phase is {handle.phase.name}",
        f"{len(handle._run.optimizers)} wrapped optimizers, {len(handle.frozen)} parameters frozen in this step",
    )
    return Checkup(facts, tuple(_problems(handle, watch, gated)))


def _problems(handle: ResidualDropPath, watch: Watch, gated: list[Branch]) -> Iterable[str]:
    if not handle.attached:
        yield "the handle was removed, so the model trains plainly; attach again"
        return
    if not handle.branches:
        yield "no branch is known yet: run a training forward, or call handle.discover(inputs)"
        return
    modules = dict(handle.model.named_modules())
    lost = [b.name for b in gated if not all(_is_gated(modules.get(gate.module), handle) for gate in b.gates)]
    if lost:
        yield f"{_listed(lost)} lost the hook, or was replaced by another module, and trains plainly; attach again"
    unreached = [b.name for i, b in enumerate(handle.branches) if b.rate > 0 and i not in watch.reached]
    if watch.forwards and unreached and not watch.compiled:
        yield (f"{_listed(unreached)} was never reached by a training forward: the model does not call it any more")
    added = [name for name, _ in handle.model.named_parameters() if name not in watch.known]
    if added:
        yield (
            f"{_listed(added)} was added after the branches were found, so it is not frozen with the branch that it is "
            "in, nor gated if it makes a branch of its own; attach again, after the model is complete"
        )
    if not handle._run.optimizers:
        yield (
            "no optimizer is wrapped: frozen parameters drift with momentum and weight decay, and phases alternate "
            "only where handle.advance() is called. Use optimizer = handle.wrap(optimizer)"
        )
    else:
        held = {id(p) for o in handle._run.optimizers for group in o.param_groups for p in group["params"]}
        parameters = dict(handle.model.named_parameters(remove_duplicate=False))
        names = (name for branch in gated for name in branch.parameters)
        loose = [
            n
            for n in dict.fromkeys(names)
            if n in parameters and parameters[n].requires_grad and id(parameters[n]) not in held
        ]
        if loose:
            yield f"{_listed(loose)} is in no wrapped optimizer: another one that moves it does not keep it frozen"
    if "unannounced" in watch.warned:
        yield "parameters changed without an announced step, so DROP and FREEZE did not alternate; see handle.wrap"
    if "stray" in watch.warned:
        yield "branches ran outside of a forward of the attached model; attach to the module that is called"
    if watch.moved:
        steps = sorted(set(watch.moved.values()))
        yield (
            f"{_listed(list(watch.moved))} moved although frozen in that step (first seen in step {steps[0]}): another "
            "optimizer, or code that writes to parameters"
        )
    rows = handle.masks.shape[1]
    if handle.options.sampling == "fixed" and rows:
        never = [b.name for b in gated if int(b.rate * rows + 0.5) == 0]
        if never:
            yield f"{_listed(never)} is never dropped: its rate rounds to 0 of {rows} rows; see sampling='bernoulli'"


def _is_gated(module: nn.Module | None, handle: ResidualDropPath) -> bool:
    hooks: list[Any] = list(module._forward_hooks.values()) if module is not None else []
    return any(isinstance(hook, Hook) and hook.run is handle._run for hook in hooks)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown
