"""A training run of an attached model: what the handle, the hooks and the optimizers share.

The handle shows it to the user and changes where it stands, the hooks begin its forwards and gate them, and the
optimizers end its steps.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from rdp.agreement import Agreement
from rdp.branches import Branch
from rdp.forward import Forward, Forwards
from rdp.options import Options
from rdp.phases import Schedule
from rdp.progress import Progress
from rdp.ranks import Ranks
from rdp.slots import Slot, present, slots
from rdp.watch import Watch

Position = tuple[Hashable, list[Any]]


class Stepper(Protocol):
    """What a run needs of a `MaskedOptimizer`."""

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the wrapped one."""

    def skipped(self) -> bool:
        """Has a step been withheld since the last call?"""

    def parameters(self) -> list[Tensor]:
        """All of them."""


class Run:
    """Which step training is at, with which masks, and which parameters are frozen in it.

    Args:
        model: The attached model.
        options: What `attach` was asked for.
        ranks: The processes that train it together.

    Attributes:
        branches: In forward order; empty until they have been found.
        by_branch: For each branch the places of its parameters.
        attached: False once the hooks have been taken out of the model.
        key: What compiled code knows the run by.
        pauses: How many `paused` contexts are open.
        optimizers: The wrapped ones, each of which has to step before the step is over.
        traced_masks: The masks of the forward that runs, for compiled parts of the model; None outside of one.
        traced_phase: The phase, as an attribute that a compiler can guard.
    """

    def __init__(self, model: nn.Module, options: Options, ranks: Ranks) -> None:
        self.model = model
        self.options = options
        self.branches: tuple[Branch, ...] = ()
        self.by_branch: list[list[Slot]] = []
        self.attached = True
        self.pauses = 0
        self.optimizers: list[Stepper] = []
        self.progress = self._new_progress(())
        self.forwards = Forwards()
        self.watch = Watch(model)
        self.agreement = Agreement(ranks, self._facts)
        self.key = id(self)
        self.traced_masks: Tensor | None = None
        self.traced_phase = self.progress.phase
        self._have_stepped: list[Optimizer] = []  # the plain ones, since one may be wrapped again

    def found(self, branches: tuple[Branch, ...], state: dict[str, Any] | None) -> None:
        """The branches are known.

        Args:
            branches: In forward order, with their rates.
            state: A state to continue from that was loaded before they were known.

        Raises:
            StateError: If the state is of other branches; nothing has changed then.
        """
        progress = self._new_progress(branches)
        progress.step_count = self.progress.step_count
        if state is not None:
            progress.load_state_dict(state, self.agreement.ranks.rank)
        self.branches, self.progress = branches, progress
        places = slots(self.model)
        self.by_branch = [[places[name] for name in branch.parameters] for branch in branches]
        self.watch.found(branches, places)
        self.traced_phase = progress.phase

    def draw_masks(self, rows: int) -> Tensor:
        """Begin a forward of `rows` rows; its masks, bool `Tensor[branches, rows]`."""
        for optimizer in self.optimizers:
            if optimizer.skipped():
                self.progress.count([])
        self.watch.forward_begins(self.progress.phase, self.progress.step_count, bool(self._have_stepped))
        masks = self.progress.begin_forward(rows, self.agreement.ranks.rank, gradients=self.watch.gradients())
        self.agreement.forward_begins(self.progress.live)
        return masks

    def current_forward(self) -> Forward | None:
        """The forward that a gate called now belongs to; None if it is not gated, or not in a forward at all."""
        # One that is not over in eval mode was interrupted.
        if self.forwards.running and not self.model.training:
            return None
        return self.forwards.current()

    def forget_interrupted(self, calls: int) -> None:
        """Forget the forwards that KeyboardInterrupt has ended; `calls` of the model are running."""
        for forward in self.forwards.forget_interrupted(calls):
            self.progress.take_back(forward.masks)

    def frozen_parameters(self) -> frozenset[int]:
        """The ids of the parameters that must not move in this step."""
        agreed = self.agreement.live
        live = (self.progress.live() if agreed is None else agreed).tolist()
        by_branch = [{id(p) for p in present(group)} for group in self.by_branch]
        moving = set().union(*(ids for alive, ids in zip(live, by_branch, strict=True) if alive))
        return frozenset(set().union(*by_branch) - moving)

    def agree(self) -> None:
        """All ranks are about to step: they learn which branches are live on any of them."""
        if self.attached:
            self.agreement.settle(self.progress.live())

    def stepped(self, optimizer: Stepper, frozen: frozenset[int] | None) -> None:
        """An optimizer has stepped; the step ends when all have.

        Args:
            optimizer: The one that has.
            frozen: What `frozen_parameters` told it; None if it did not ask.
        """
        if not self.progress.forwards and self.attached:
            self.watch.warn(
                "idle",
                "the optimizer stepped, but no gated training forward of the attached model came before it: Residual "
                "DropPath had no part in this step. Is the model in eval mode, or was only a part of it called?",
            )
        if self.optimizers and all(o.optimizer is not optimizer.optimizer for o in self.optimizers):
            self.watch.warn(
                "replaced",
                f"this {type(optimizer.optimizer).__name__} stepped, although the handle has wrapped another optimizer "
                "over some of the same parameters since, which took its place. Give each parameter to one optimizer; "
                "where several alternate, step plain ones and call handle.advance() after each step",
            )
        self._have_stepped.append(optimizer.optimizer)
        waiting = [o for o in self.optimizers if o.optimizer not in self._have_stepped]
        if not waiting or self._have_stepped.count(optimizer.optimizer) > 1:
            self.advance(frozen)

    def advance(self, frozen: frozenset[int] | None = None) -> None:
        """End the current step.

        Args:
            frozen: What `frozen_parameters` has told already; None to ask it now.
        """
        self.watch.step_ends(self.frozen_parameters() if frozen is None else frozen)
        self.progress.advance()
        self.traced_phase = self.progress.phase
        self.forwards.forget()
        self._have_stepped.clear()
        self.agreement.forget()

    def moved(self) -> None:
        """Training goes on at another point than it was at."""
        self.traced_phase = self.progress.phase
        self.forwards.forget()
        self.watch.forget()
        self.agreement.forget()

    def forget_finished(self) -> None:
        """Forget the forwards of this step whose gradients exist already, since these are thrown away."""
        if not self._have_stepped:  # else they have been used, and the other optimizers will use theirs
            self.progress.forget_finished(self.watch.gradients())

    def position(self) -> Position:
        """Where the step stands, for `restart_step`."""
        return self.watch.gradients(), self.progress.counted()

    def restart_step(self, position: Position) -> None:
        """A closure is about to run: forget the forwards since `position`.

        Those before it still count, as they do in gradient accumulation, unless the optimizer itself has thrown their
        gradients away, as SAM does between its two forwards.
        """
        gradients, counted = position
        cleared = gradients != self.watch.gradients() and self.watch.has_no_gradients()
        self.progress.count([] if cleared else counted)
        self.watch.forget()  # the optimizer itself moves parameters between two calls of a closure

    def _new_progress(self, branches: tuple[Branch, ...]) -> Progress:
        options = self.options
        return Progress(
            Schedule(options.phases),
            branches,
            seed=options.seed,
            mode=options.mode,
            sampling=options.sampling,
            # With frozen parameters instead of frozen outputs all micro-batches must agree on what is frozen.
            one_draw=options.freeze == "params",
        )

    def _facts(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        progress, options = self.progress, self.options
        return {
            "the step": progress.step_count,
            "the branches": [branch.name for branch in self.branches],
            "the rates": [branch.rate for branch in self.branches],
            "the seed": progress.seed,
            "the phases, mode or sampling": (progress.schedule.phases, options.mode, options.sampling),
        }
