"""A training run of an attached model: what the handle, the hooks and the optimizers share.

The handle shows it to the user and changes where it stands, the hooks of the model itself (`model_hooks.py`) begin its
forwards, the others gate them, and the optimizers end its steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from rdp.branches import Branch
from rdp.calls import Inputs
from rdp.distributed.agreement import Agreement
from rdp.distributed.ranks import Ranks
from rdp.inputs import Rows
from rdp.options import Options
from rdp.phases import Phase
from rdp.training import compiled
from rdp.training.cycles import Cycles
from rdp.training.drawing import drawn
from rdp.training.first_cycle import FirstCycle
from rdp.training.frozen import Frozen, Probes, Slot, slots
from rdp.training.recomputation import Calls
from rdp.training.step import Draw, Forward
from rdp.training.switches import Switch
from rdp.training.watch import Watch


class Stepper(Protocol):
    """What a run needs of a `MaskedOptimizer`: the wrapped optimizer, and its parameters."""

    optimizer: Optimizer

    def parameters(self) -> list[Tensor]: ...  # noqa: D102


class Run:
    """Which step training is at, with which masks, and which parameters are frozen in it.

    Args:
        model: The attached model.
        options: What `attach` was asked for.
        ranks: The processes that train it together.
        discover: Called with the arguments of the first training forward, if branches are not known by then.

    Attributes:
        look: Called as a training forward begins, to see whether the branches are where they were.
        look_again: Called where there may be branches that are not known, with the inputs of a forward, if at hand.
        branches: In forward order; empty until they have been found.
        blocks: The modules that add them.
        rows: Where the rows of the model's inputs are; None if that is not known, as it need not be in batch mode.
        expected: Names and rates of the branches that a state has which was loaded before they were known.
        sized_for: The number of rows of the latest training forward, which decides what runs on rows.
        ends: The first and the last of them that are gated.
        seed: Of the masks.
        cycles: Makes the steps.
        step: The current step.
        masks: Of the latest training forward, bool `Tensor[branches, rows]`.
        first: What the first cycle has shown.
        calls: The calls of the model that are running.
        frozen: The parameters of the branches.
        attached: False once the hooks have been taken out of the model.
        compiled: What compiled code is given of the forward that runs; None outside of one.
        compiles: Was a part of the model seen to be compiled?
        switches: By branch, what its gates do, for parts that are compiled in batch mode.
        counted: Which graph was traced last, and how many gates of it are switched.
        graphs: Torch's limit of graphs, while another is set.
        pauses: How many `paused` contexts are open.
        optimizers: The wrapped ones, each of which has to step before the step is over.
        held: The parameters of the wrapped optimizers, by name.
        several: Do several processes train the model together?
        in_graph: Branches that may not be left out of the graph, since hooks of the user's expect their backward.
    """

    def __init__(self, model: nn.Module, options: Options, ranks: Ranks, discover: Callable[..., None]) -> None:
        self.model, self.options, self.discover = model, options, discover
        self.look: Callable[[], object] = bool
        self.look_again: Callable[[Inputs | None], None] = lambda inputs: None
        self.probes = Probes()
        self.cycles = Cycles(options, self.probes)
        self.schedule = self.cycles.schedule
        self.gated_phases = (Phase.DROP, Phase.FREEZE) if options.freeze == "output" else (Phase.DROP,)
        self.branches: tuple[Branch, ...] = ()
        self.blocks: list[nn.Module] = []
        self.rows: Rows | None = None
        self.expected: tuple[list[str], list[float]] | None = None
        self.sized_for = 0
        self.ends: tuple[int, ...] = ()
        self.seed = options.seed
        self.frozen = Frozen((), {})
        self.calls = Calls()
        self.watch = Watch(model)
        self.first = FirstCycle()
        self.agreement = Agreement(ranks, self.facts)
        self.attached, self.several, self.pauses = True, False, 0
        self.compiled: compiled.Given | None = None
        self.compiles = False
        self.switches: defaultdict[int, Switch] = defaultdict(Switch)
        self.counted: tuple[object, int] = (None, 0)
        self.graphs: int | None = None
        self.optimizers: list[Stepper] = []
        self.held: dict[str, Tensor] = {}
        self.in_graph: set[int] = set()
        self.go_to(0, {})

    @property
    def phase(self) -> Phase:
        """The phase of the current step, which is plain all the same in a cycle whose rate is 0."""
        return self.schedule.at(self.step.number)[0]

    def go_to(
        self,
        number: int,
        replay: Mapping[int, Draw],
        forwards: Sequence[tuple[int, int]] = (),
        rate: float | None = None,
    ) -> None:
        """Go on at another step, or within it.

        Args:
            number: How many steps have ended before.
            replay: See `Step`.
            forwards: The position and the number of rows of each forward that has learnt in it.
            rate: Of the cycle; None takes that of its DROP as it would be now.
        """
        self.step = self.cycles.step(number, replay, rate)
        self.masks = torch.ones(len(self.branches), 0, dtype=torch.bool, device="cpu")
        for position, rows in forwards:
            self._new_forward(position, rows).learnt = True
        self.watch.forget()

    def found(self, branches: tuple[Branch, ...]) -> None:
        """The branches are known."""
        self.blocks = [self.model.get_submodule(branch.block) for branch in branches]
        self.cycles.found(branches)
        self.followed(self.cycles.rated(branches), slots(self.model))
        self.expected, self.sized_for = None, 0
        gated = [index for index, branch in enumerate(branches) if branch.gated]
        self.ends = (*gated[:1], *gated[-1:])
        self.go_to(self.step.number, self.step.replay, self.step.learnt(), self.step.rate)

    def followed(self, branches: tuple[Branch, ...], places: Mapping[str, Slot]) -> None:
        """The parameters of the branches are known, or known to be in other places than before."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        blocks = zip(self.blocks, branches, strict=True)
        self.blocks = [old if old in modules.values() else modules.get(b.block, old) for old, b in blocks]
        self.frozen, self.branches = Frozen(branches, places), branches
        self.probes.choose(self.model, branches, self.held)
        self.watch.found(places, {*self.probes.names, *(name for branch in branches for name in branch.parameters)})
        self.watch.forget()

    def wrapped(self, optimizer: Stepper) -> None:
        """An optimizer has been wrapped; it takes the place of another over some of the same parameters."""
        ids = {id(p) for p in optimizer.parameters()}
        self.optimizers = [o for o in self.optimizers if ids.isdisjoint(map(id, o.parameters()))] + [optimizer]
        self.held |= {name: p for name, p in self.model.named_parameters() if id(p) in ids}
        self.probes.choose(self.model, self.branches, self.held)

    def facts(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        return {
            "the step": self.step.number,
            "the branches": [branch.name for branch in self.branches],
            "the rates": list(self.step.rates),
            "the seed": self.seed,
            "the phases, mode or sampling": (self.schedule.phases, self.options.mode, self.options.sampling),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forwards are plain and do not count."""
        depth = len(self.calls.running)
        self.pauses += 1
        try:
            yield
        finally:
            self.pauses -= 1
            del self.calls.running[depth:]  # no hook is called where KeyboardInterrupt ended a forward

    def begin_forward(self, rows: int) -> Forward:
        """Begin a training forward of `rows` rows: draw its masks."""
        self.look()
        step = self.step
        if rows != self.sized_for and step.given is None:
            self.sized_for, self.branches = rows, tuple(branch.sized(rows) for branch in self.branches)
        self.watch.forward_begins(step.phase, step.number, bool(step.stepped))
        forward = self._new_forward(step.place(), rows)
        if self.several:
            forward.question = self.agreement.forward_begins(forward.live)
        return forward

    def _new_forward(self, position: int, rows: int) -> Forward:
        step, options = self.step, self.options
        together = dist.is_available() and dist.is_initialized() and self.agreement.ranks.size > 1
        self.several = together and step.given is None
        # With frozen parameters instead of frozen outputs all micro-batches must agree on what is frozen.
        number = 0 if options.freeze == "params" else position
        # FREEZE begins again where it has more forwards than DROP had.
        again = step.replayed[number % len(step.replay)] if step.replayed else Draw(number, rows)
        rank = self.agreement.ranks.rank if self.several else 0
        self.masks, draw = drawn(step, step.replayed.get(number, again), rows, options, self.seed, rank)
        plain = [branch for branch, block in enumerate(self.blocks) if not block.training]
        if plain:
            self.masks = self.masks.clone()
            self.masks[plain] = True
        live = self.frozen.live(self.masks, step.phase, plain)
        forward = Forward(step.phase, position, draw, self.masks, live, plain)
        step.forwards.append(forward)
        return forward

    def live(self) -> Tensor:
        """The branches that learn in this step, as far as can be told, bool `Tensor[branches]`."""
        if self.step.agreed is not None:
            return self.step.agreed
        # Before a backward, and after one that could not be seen: those that would count.
        forwards = self.step.counted() or [forward for forward in self.step.forwards if not forward.spent]
        return self.frozen.live_in_any([forward.live for forward in forwards])

    def settle(self) -> frozenset[int]:
        """An optimizer is about to step; the ids of the parameters that must not move."""
        step = self.step
        step.settled = step.counted()
        forwards = step.settled or [forward for forward in step.forwards if not forward.spent]
        live = self.frozen.live_in_any([forward.live for forward in forwards])
        if self.several and self.attached:
            questions = [forward.question for forward in forwards if forward.question is not None]
            step.agreed = live = self.agreement.settle(live, questions)
        return self.frozen.parameters(live)

    def announced(self) -> None:
        """The user says that the step is over, who may have cleared by now the gradients that were used."""
        for forward in self.step.counted() or [f for f in self.step.forwards if f.learnt and not f.spent]:
            forward.learnt = forward.used = True
        self.advance(self.frozen.parameters(self.live()))

    def evaluates(self, before: Collection[Forward]) -> None:
        """A closure is about to be called: its earlier calls do not count, but the forwards `before` the step do."""
        for forward in self.step.forwards:
            forward.spent |= forward not in before
        self.watch.forget()  # the optimizer itself moves parameters between two calls of a closure

    def stepped(self, optimizer: Stepper, frozen: frozenset[int]) -> None:
        """An optimizer has stepped, with these parameters frozen; the step ends when all have."""
        step = self.step
        for forward in step.settled:
            forward.learnt = forward.used = True
        if self.attached and all(forward.spent for forward in step.forwards):
            self.watch.idle()
        if self.optimizers and all(o.optimizer is not optimizer.optimizer for o in self.optimizers):
            self.watch.replaced(optimizer.optimizer)
        step.stepped.append(optimizer.optimizer)
        waiting = [o for o in self.optimizers if o.optimizer not in step.stepped]
        if not waiting or step.stepped.count(optimizer.optimizer) > 1:
            self.advance(frozen)

    def advance(self, frozen: frozenset[int]) -> None:
        """End the current step, in which these parameters were frozen."""
        step = self.step
        self.watch.step_ends(frozen)
        self.watch.counts(step, self.frozen)
        if self.attached and self.cycles.rate > 0:  # or plain is what it is meant to be
            if self.watch.detour:  # for a whole step, where compiled code calls the model without asking Python
                self.look_again(None)
            self.watch.notice_detour()
        self.step = self.cycles.after(step)
        self.first.step_ends(self)

    def set_rate(self, rate: float) -> None:
        """Another rate, from the next DROP on; that is the current step if no forward of it has begun."""
        self.cycles.rate = rate
        self.branches = self.cycles.rated(self.branches)
        if self.phase is Phase.DROP and not self.step.forwards:
            self.go_to(self.step.number, self.step.replay)
