"""The report of `handle.check()`: what is attached, what has happened so far, and what is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rdp.branches import Branch, Refusal
from rdp.copies import Hook
from rdp.errors import listed
from rdp.proof import Proof

if TYPE_CHECKING:
    from rdp.training.run import Run

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


def check(run: Run, refused: Sequence[Refusal], proof: Proof | None = None) -> Checkup:
    """Examine a run and its model; see `ResidualDropPath.check`."""
    watch, step = run.watch, run.step
    gated = [b for b in run.branches if b.rate > 0]
    ungated = f", {len(refused)} sums not gated" if refused else ""
    frozen = len(run.frozen.parameters(run.live()))
    facts = (
        f"{type(run.model).__name__}: {len(gated)} gated branches of {len(run.branches)}{ungated}",
        f"{watch.forwards} training forwards, {step.number} steps; the phase is {step.phase.name}",
        f"{len(run.optimizers)} wrapped optimizers, {frozen} parameters frozen in this step",
        *([str(proof)] if proof is not None else []),
    )
    violations = (f"branch `{name}`: {why}" for name, why in (proof.violations if proof is not None else {}).items())
    return Checkup(facts, (*violations, *_problems(run, gated)))


def _problems(run: Run, gated: list[Branch]) -> Iterable[str]:
    watch = run.watch
    if not run.attached:
        yield "the handle was removed, so the model trains plainly; attach again"
        return
    if not run.branches:
        yield "no branch is known yet: run a training forward, or call handle.discover(inputs)"
        return
    modules = dict(run.model.named_modules())
    lost = [b.name for b in gated if not all(_is_gated(modules.get(gate.module), run) for gate in b.gates)]
    if lost:
        yield f"{_named(lost)} lost the hook, or was replaced by another module, and trains plainly; attach again"
    unreached = [b.name for i, b in enumerate(run.branches) if b.rate > 0 and i not in watch.reached]
    if watch.forwards and unreached:
        yield (f"{_named(unreached)} was never reached by a training forward: the model does not call it any more")
    added = [name for name, _ in run.model.named_parameters() if name not in watch.known]
    if added:
        yield (
            f"{_named(added)} was added after the branches were found, so it is not frozen with the branch that it is "
            "in, nor gated if it makes a branch of its own; attach again, after the model is complete"
        )
    if not run.optimizers:
        yield (
            "no optimizer is wrapped: frozen parameters drift with momentum and weight decay, and phases alternate "
            "only where handle.advance() is called. Use optimizer = handle.wrap(optimizer)"
        )
    else:
        held = {id(p) for optimizer in run.optimizers for p in optimizer.parameters()}
        parameters = dict(run.model.named_parameters(remove_duplicate=False))
        names = (name for branch in gated for name in branch.parameters)
        loose = [
            n
            for n in dict.fromkeys(names)
            if n in parameters and parameters[n].requires_grad and id(parameters[n]) not in held
        ]
        if loose:
            yield f"{_named(loose)} is in no wrapped optimizer: another one that moves it does not keep it frozen"
    if "unannounced" in watch.warned:
        yield "parameters changed without an announced step, so DROP and FREEZE did not alternate; see handle.wrap"
    if "stray" in watch.warned:
        yield "branches ran outside of a forward of the attached model; attach to the module that is called"
    if watch.moved:
        steps = sorted(set(watch.moved.values()))
        yield (
            f"{_named(list(watch.moved))} moved although frozen in that step (first seen in step {steps[0]}): another "
            "optimizer, or code that writes to parameters"
        )
    if watch.woken:
        yield f"{_named(list(watch.woken))} did not train when it was found, so it has no rate, and trains plainly now"
    rows = run.masks.shape[1]
    if run.options.sampling == "fixed" and rows:
        never = [b.name for b in gated if int(b.rate * rows + 0.5) == 0]
        if never:
            yield f"{_named(never)} is never dropped: its rate rounds to 0 of {rows} rows; see sampling='bernoulli'"


def _is_gated(module: nn.Module | None, run: Run) -> bool:
    hooks: list[Any] = list(module._forward_hooks.values()) if module is not None else []
    return any(isinstance(hook, Hook) and hook.owner is run for hook in hooks)


def _named(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in names], _LISTED)
