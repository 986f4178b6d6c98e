"""The report of `handle.check()`: what is attached, what has happened so far, and what is not as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdp.branches import Branch, Refusal
from rdp.errors import listed, warn
from rdp.phases import Phase
from rdp.proof import Proof
from rdp.training.gate_hooks import GateHook

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
        count = len(self.problems)
        verdict = "sound" if self.ok else f"{count} problem{'s' * (count > 1)}"
        return "\n".join([verdict, *self.facts, *(f"PROBLEM: {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    key: str
    """Tells it from others, also from the warnings of `training/watch.py`."""
    text: str
    certain: bool = False
    """Is it wrong in any training? Then the first cycle warns of it; the rest is for who asks."""


def check(run: Run, refused: Sequence[Refusal], proof: Proof | None = None) -> Checkup:
    """Examine a run and its model; see `ResidualDropPath.check`."""
    watch, step = run.watch, run.step
    gated = [b for b in run.branches if b.gated]
    plain = " (the others have rate 0 and are trained plainly in all phases)" if len(gated) < len(run.branches) else ""
    ungated = f", {len(refused)} sums not gated" if refused else ""
    frozen = len(run.frozen.parameters(run.live()))
    facts = (
        f"{type(run.model).__name__}: {len(gated)} gated branches of {len(run.branches)}{plain}{ungated}",
        f"{watch.forwards} training forwards, {step.number} steps; the phase is {run.phase.name}",
        f"{len(run.optimizers)} wrapped optimizers, {frozen} parameters frozen in this step",
        *([str(proof)] if proof is not None else []),
        *_rows(run),
    )
    violations = (f"branch `{name}`: {why}" for name, why in (proof.violations if proof is not None else {}).items())
    idle = (
        f"branch `{name}` runs without gradients in training, but takes part in the rates of the others; attach again"
        for name in (proof.idle if proof is not None else ())
    )
    return Checkup(facts, (*violations, *idle, *(problem.text for problem in _problems(run, gated))))


def warn_after_first_cycle(run: Run) -> bool:
    """Say in one warning what is certainly wrong, if anything is; what was told already is left out."""
    gated = [b for b in run.branches if b.gated]
    problems = [p for p in _problems(run, gated) if p.certain and p.key not in run.watch.warned]
    told = [problem.text for problem in problems]
    run.watch.warned |= {problem.key for problem in problems}
    if told:
        warn(
            f"this {type(run.model).__name__} is not trained as it should be: {'; '.join(told)}. "
            "handle.check() says more"
        )
    return bool(told)


def _rows(run: Run) -> Iterator[str]:
    """On how many rows each gated branch has learnt."""
    learnt = {phase: counts for phase, counts in run.watch.learnt.items() if phase is not Phase.PLAIN}
    for index, branch in enumerate(run.branches if learnt else ()):
        if branch.gated:
            counts = (f"{rows[index]} of {total} in {phase.name}" for phase, (rows, total) in learnt.items())
            yield f"rows that `{branch.name}` learnt on: {', '.join(counts)}"


def _problems(run: Run, gated: Sequence[Branch]) -> Iterator[Problem]:
    if not run.attached:
        yield Problem("removed", "the handle was removed, so the model trains plainly; attach again")
        return
    yield from _nothing_gated(run, gated)
    if not run.branches:
        return
    yield from _gates(run)
    yield from _parameters(run, gated)
    yield from _steps(run, gated)


def _nothing_gated(run: Run, gated: Sequence[Branch]) -> Iterator[Problem]:
    watch = run.watch
    only_eval = watch.evaluations and not watch.forwards
    if watch.empty and (watch.empty == watch.steps or "idle" in watch.warned):
        way_out = "call the attached model itself in every step, in training mode and outside of handle.paused()"
        why = "it was called in eval mode only: call model.train()" if only_eval else way_out
        yield Problem(
            "idle",
            f"{watch.empty} of {watch.steps} steps had no training forward of the attached model; {why}",
            certain=bool(only_eval),  # an optimizer that is wrapped has said so, and steps may be skipped by hand
        )
    if not run.branches:
        yield Problem("unknown", "no branch is known yet: run a training forward, or call handle.discover(inputs)")
    elif not gated and run.options.rate > 0:
        yield Problem(
            "rates", "all branches have rate 0, so nothing is gated; see branches= and decay='constant'", True
        )
    if run.options.rate > 0 and not {Phase.DROP, Phase.FREEZE} & set(run.schedule.phases):
        yield Problem("phases", "phases= holds neither DROP nor FREEZE, so nothing is gated")


def _gates(run: Run) -> Iterator[Problem]:
    watch = run.watch
    branches = [(i, b) for i, b in enumerate(run.branches) if b.gated]
    lost = [branch.name for branch in _lost(run)]
    if lost:
        yield Problem(
            "lost",
            f"{_named(lost)} lost the hook, or was replaced by another module, and trains plainly; attach again",
            certain=True,
        )
    unreached = [b.name for i, b in branches if i not in watch.reached and b.name not in lost]
    if watch.forwards and unreached and not watch.unseen:
        yield Problem(
            "unreached",
            f"{_named(unreached)} was never reached by a training forward: the model does not call it any more",
            certain=True,
        )
    for (without, of), indices in run.first.skipped().items():
        names = [b.name for i, b in branches if i in indices and i not in watch.traced]
        if names:
            yield Problem(
                "skipped",
                f"{_named(names)} was not called in {without} of {of} forwards: does the model skip it by itself "
                "(LayerDrop, stochastic depth)? Both together drop too much; switch that of the model off",
                certain=True,
            )
    if "stray" in watch.warned:
        yield Problem(
            "stray", "branches ran outside of a forward of the attached model; attach to the module that is called"
        )
    if watch.woken:
        yield Problem(
            "woken",
            f"{_named(list(watch.woken))} did not train when it was found, so it has no rate, and trains plainly now",
        )
    if watch.late:
        yield Problem(
            "late",
            f"{_named(watch.late)} did not run when the branches were found, and trains plainly now; attach again, "
            "when the model goes this way",
        )
    rows = run.masks.shape[1]
    if run.options.sampling == "fixed" and rows:
        never = [b.name for _, b in branches if b.rate and int(b.rate * rows + 0.5) == 0]
        if never:
            yield Problem(
                "rounded",
                f"{_named(never)} is never dropped: its rate rounds to 0 of {rows} rows; see sampling='bernoulli'",
            )


def _parameters(run: Run, gated: Sequence[Branch]) -> Iterator[Problem]:
    watch, parameters = run.watch, dict(run.model.named_parameters(remove_duplicate=False))
    owned = list(dict.fromkeys(name for branch in gated for name in branch.parameters))
    added = [name for name, _ in run.model.named_parameters() if name not in watch.known]
    if added:
        holders = tuple({f"{holder}." for name in owned if (holder := name.rpartition(".")[0])})
        yield Problem(
            "added",
            f"{_named(added)} was added after the branches were found, so it is not frozen with the branch that it is "
            "in, nor gated if it makes a branch of its own; attach again, after the model is complete",
            certain=any(name.startswith(holders) for name in added),  # and not a new head, say
        )
    if run.optimizers:
        held = {id(p) for optimizer in run.optimizers for p in optimizer.parameters()}
        trained = [name for name in owned if name in parameters and parameters[name].requires_grad]
        loose = [name for name in trained if id(parameters[name]) not in held]
        if loose:
            yield Problem(
                "loose",
                f"{_named(loose)} is in no wrapped optimizer: another one that moves it does not keep it frozen",
                certain=not watch.moving().isdisjoint(loose),  # it may be meant to stay as it is
            )
    if watch.moved:
        steps = sorted(set(watch.moved.values()))
        yield Problem(
            "moved",
            f"{_named(list(watch.moved))} moved although frozen in that step (first seen in step {steps[0]}): another "
            "optimizer, or code that writes to parameters",
            certain=bool(run.optimizers) or Phase.FREEZE in run.schedule.phases,  # and not DropPath of a loop's own
        )
    lost = {name for branch in _lost(run) for name in branch.parameters}
    around = {name: step for name, step in run.first.around.items() if name not in lost}
    if around:
        name, step = next(iter(around.items()))
        yield Problem(
            "around",
            f"{_named(list(around))} is frozen, but the output still depends on it (`{name}` in step {step}):"
            " it would learn by a way around the gate. Leave its branch out (branches=), and report the model",
            certain=True,
        )


def _steps(run: Run, gated: Sequence[Branch]) -> Iterator[Problem]:
    watch = run.watch
    # Who has called handle.advance() has a loop of his own, of which `moved` tells what is wrong.
    dropping = gated and run.cycles.rate > 0
    if dropping and not run.optimizers and not watch.steps and Phase.FREEZE in run.schedule.phases:
        yield Problem(
            "unwrapped",
            "no optimizer is wrapped: frozen parameters drift with momentum and weight decay, and phases alternate "
            "only where handle.advance() is called. Use optimizer = handle.wrap(optimizer)",
        )
    if "unannounced" in watch.warned:
        yield Problem(
            "unannounced",
            "parameters changed without an announced step, so DROP and FREEZE did not alternate; see handle.wrap",
        )
    # A last cycle of an epoch that is cut short differs now and then, and is no problem.
    if watch.differing > 1 and watch.differing > 3 * (watch.compared - watch.differing):
        yield Problem(
            "numbers",
            f"{watch.differing} of {watch.compared} FREEZE steps had another number of forwards than their DROP step, "
            "so what was dropped there is not what learns here; accumulate equally many micro-batches in all steps",
        )


def _lost(run: Run) -> list[Branch]:
    """The gated branches that have lost a gate; one that was moved together with its module is not lost."""
    hooks = (hook for module in run.model.modules() for hook in module._forward_hooks.values())
    there = Counter(hook.branch for hook in hooks if isinstance(hook, GateHook) and hook.owner is run)
    return [b for index, b in enumerate(run.branches) if b.gated and there[index] < len(b.gates)]


def _named(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in names], _LISTED)
