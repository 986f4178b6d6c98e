"""The handle that `attach` returns: the one object that holds hooks, phases and masks together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rdp import hooks, setup, traced
from rdp.agreement import Agreement, ShadowHook
from rdp.branches import Branch, Refusal, branch_table
from rdp.discovery.forwards import batch_size
from rdp.doctor import Checkup, Watch, check
from rdp.errors import ArgumentError, StateError
from rdp.forward import Forwards
from rdp.native import NativeDrop, find_native_drops
from rdp.optim import MaskedOptimizer
from rdp.options import Options
from rdp.phases import Phase, Schedule
from rdp.progress import Progress
from rdp.ranks import Ranks, check_sharding
from rdp.slots import Slot, present, slots

Position = tuple[Hashable, list[Any]]


class ResidualDropPath:
    """A model's Residual DropPath: its branches, the phase, the masks. Made by `attach`.

    Printing it shows the table of branches. As a context manager it removes itself on exit.

    Attributes:
        model: The attached model.
        options: What `attach` was asked for.
        branches: The gated branches in forward order, and those of rate 0; empty until they have been found.
        refused: Residual sums whose branches cannot be gated soundly, with the reasons.
        attached: False once removed.
    """

    def __init__(self, model: nn.Module, options: Options, ranks: Ranks) -> None:
        self.model = model
        self.options = options
        self.branches: tuple[Branch, ...] = ()
        self.refused: tuple[Refusal, ...] = ()
        self.attached = True
        self._schedule = Schedule(options.phases)
        self._progress = self._new_progress()
        self._pending_state: dict[str, Any] | None = None
        self._forwards = Forwards()
        self._pauses = 0
        self._watch = Watch(model)
        self._agreement = Agreement(ranks, self._facts)
        self._silenced: list[NativeDrop] = find_native_drops(model) if options.native == "off" else []
        for drop in self._silenced:
            drop.silence()
        self._by_branch: list[list[Slot]] = []
        self._key = traced.register(self)
        self._traced_masks: Tensor | None = None
        self._traced_phase = self.phase
        self._optimizers: list[MaskedOptimizer] = []
        self._have_stepped: list[MaskedOptimizer] = []
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(hooks.BeginHook(self), with_kwargs=True, prepend=True),
            model.register_forward_hook(hooks.EndHook(self), always_call=True),
        ]
        traced.forget_compiled()

    @property
    def phase(self) -> Phase:
        """The phase of the current optimizer step."""
        return self._progress.phase

    @property
    def step_count(self) -> int:
        """The number of optimizer steps that have ended."""
        return self._progress.step_count

    @property
    def masks(self) -> Tensor:
        """The masks of the latest training forward, bool `Tensor[branches, rows]` on the CPU; `True` is undropped."""
        return self._progress.masks

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that do not move in the current step, as far as its forwards have shown."""
        frozen = self._frozen_parameters()
        return tuple(name for name, p in self.model.named_parameters() if id(p) in frozen)

    def wrap(self, optimizer: Optimizer) -> MaskedOptimizer:
        """Wrap an optimizer so that frozen parameters do not move and each `step` goes to the next phase.

        Args:
            optimizer: Any `torch.optim.Optimizer` over the model's parameters. With several, all of them wrapped,
                the phase ends when each has stepped.

        Returns:
            An optimizer that shares `param_groups`, `state` and `state_dict` with the wrapped one.

        Raises:
            ArgumentError: If it is no optimizer, is wrapped already, or holds none of the model's parameters.
        """
        wrapped = MaskedOptimizer(optimizer, self)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(id(p) for p in self.model.parameters()):
            raise ArgumentError(
                f"this {type(optimizer).__name__} holds no parameter of the attached {type(self.model).__name__}; "
                "build it from model.parameters() of the very model that was attached"
            )
        # A new optimizer over the same parameters, for a second stage of training, takes the place of the old one.
        self._optimizers = [o for o in self._optimizers if held.isdisjoint(map(id, o.parameters()))]
        self._optimizers.append(wrapped)
        return wrapped

    def advance(self) -> None:
        """End the current optimizer step and go to the next phase; `MaskedOptimizer.step` does so by itself."""
        self._watch.step_ends(self._frozen_parameters())
        self._progress.advance()
        self._traced_phase = self.phase
        self._forwards.forget()
        self._have_stepped.clear()
        self._agreement.forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forwards are plain and do not count."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def discover(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> None:
        """Find the branches now, from the inputs of a forward; does nothing where they are known.

        Args:
            inputs: A tensor, a tuple of positional or a dict of keyword arguments; at most two rows are used.

        Raises:
            ArgumentError: If there is no tensor with rows in `inputs`.
            BranchError: If no branch is found, or one that was named is not there.
        """
        kwargs = inputs if isinstance(inputs, Mapping) else {}
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        if not batch_size(args, kwargs):
            raise ArgumentError(
                "example_inputs must be what the model is called with, a tensor, a tuple or a dict of keyword "
                f"arguments, with at least one row; got {setup.shortened(inputs)}"
            )
        self._discover(args, kwargs)

    def check(self) -> Checkup:
        """Examine what has happened since `attach`; call it after a few steps and print the answer.

        Returns:
            What is attached, and problems: branches that no forward reached or that lost their hook, phases that do
            not alternate, optimizers that are not wrapped, frozen parameters that moved all the same.
        """
        return check(self)

    def remove(self) -> None:
        """Take everything out of the model again; it is exactly as before `attach`. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        for drop in self._silenced:
            drop.restore()
        if self._hooks:
            traced.forget_compiled()
        self._agreement.ranks.leave()
        self._hooks, self._silenced, self.attached = [], [], False

    def state_dict(self) -> dict[str, Any]:
        """Counters, seed and masks, as tensors and plain numbers: `torch.load(..., weights_only=True)` reads it."""
        if self._pending_state is not None:
            return self._pending_state
        return self._progress.state_dict() | {"ranks": self._agreement.ranks.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved; before the branches are found it is kept until then.

        One rank's state does for all, unless they had different numbers of micro-batches (or of rows, with
        `sampling="fixed"`): then each must load what it saved.

        Raises:
            StateError: If the state is of a handle with other branches, rates, phases or another mode, or of another
                number of ranks.
        """
        self._progress.check(state)
        saved, here = state.get("ranks"), self._agreement.ranks.size
        if not isinstance(saved, int):
            raise StateError(f"ranks in the state is damaged or missing: {setup.shortened(saved)}. Load another one")
        if saved != here and self.options.mode == "row":
            raise StateError(
                f"the state was saved by {saved} ranks and is loaded by {here}, whose rows would be masked otherwise. "
                f"Resume with {saved}, or set state['ranks'] = {here} to accept other masks from here on"
            )
        self._progress.load_state_dict(state, self._agreement.ranks.rank)
        self._pending_state = None if self.branches else state
        self._moved()

    def join_hook(self, **kwargs: Any) -> ShadowHook:
        """What `torch.distributed.algorithms.join.Join([ddp_model, handle])` does on ranks that are out of data."""
        self._agreement.ranks.connect()
        return ShadowHook(self._agreement, lambda: self.step_count, self._skip_to)

    @property
    def join_device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def join_process_group(self) -> Any:
        """The processes that train the model together."""
        return self._agreement.ranks.process_group or torch.distributed.group.WORLD

    def __enter__(self) -> ResidualDropPath:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"step {self.step_count}, phase {self.phase.name}" if self.attached else "removed"
        head = f"ResidualDropPath({type(self.model).__name__}, rate={self.options.rate}, mode={self.options.mode!r}): "
        if not self.branches:
            return f"{head}{state}; branches will be found in the first training forward"
        return f"{head}{state}\n{branch_table(self.branches, self.refused)}"

    def _new_progress(self, branches: tuple[Branch, ...] = ()) -> Progress:
        options = self.options
        # With frozen parameters instead of frozen outputs all micro-batches must agree on what is frozen.
        one_draw = options.freeze == "params"
        return Progress(
            self._schedule,
            branches,
            seed=options.seed,
            mode=options.mode,
            sampling=options.sampling,
            one_draw=one_draw,
        )

    def _discover(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.branches:
            return
        setup.check_unattached(self.model, besides=self)
        check_sharding(self.model, self._agreement.ranks)
        with self.paused():
            branches, refused, programs = setup.choose_branches(self.model, self.options, args, kwargs)
        progress = self._new_progress(branches)
        progress.step_count = self._progress.step_count
        if self._pending_state is not None:
            progress.load_state_dict(self._pending_state, self._agreement.ranks.rank)
        self.branches, self.refused = branches, refused
        self._progress, self._pending_state = progress, None
        places = slots(self.model)
        self._by_branch = [[places[name] for name in branch.parameters] for branch in self.branches]
        self._watch.found(self.branches, places)
        for index, branch in enumerate(self.branches):
            if branch.rate > 0:
                self._hooks += hooks.install(self, index, branch, programs.get(branch.name))
        self._traced_phase = self.phase
        traced.forget_compiled()

    def _draw_masks(self, rows: int) -> Tensor:
        """Begin a forward of `rows` rows; its masks."""
        for optimizer in self._optimizers:
            if optimizer.skipped():
                self._progress.count([])
        self._watch.forward_begins(self.phase, self.step_count, bool(self._have_stepped))
        masks = self._progress.begin_forward(rows, self._agreement.ranks.rank, gradients=self._watch.gradients())
        self._agreement.forward_begins(self, self._progress.live)
        return masks

    def _frozen_parameters(self) -> frozenset[int]:
        """The ids of the parameters that must not move in this step."""
        agreed = self._agreement.live
        live = (self._progress.live() if agreed is None else agreed).tolist()
        by_branch = [{id(p) for p in present(group)} for group in self._by_branch]
        moving = set().union(*(ids for alive, ids in zip(live, by_branch, strict=True) if alive))
        return frozenset(set().union(*by_branch) - moving)

    def _skip_to(self, step: int) -> None:
        self._progress.skip_to(step)
        self._moved()

    def _moved(self) -> None:
        """Training goes on at another point than it was at."""
        self._traced_phase = self.phase
        self._forwards.forget()
        self._watch.forget()
        self._agreement.forget()

    def _agree(self) -> None:
        """All ranks are about to step."""
        if self.attached:
            self._agreement.settle(self._progress.live())

    def _facts(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        progress, options = self._progress, self.options
        return {
            "the step": progress.step_count,
            "the branches": [branch.name for branch in self.branches],
            "the rates": [branch.rate for branch in self.branches],
            "the seed": progress.seed,
            "the phases, mode or sampling": (progress.schedule.phases, options.mode, options.sampling),
        }

    def _forget_finished(self) -> None:
        """Forget the forwards of this step whose gradients exist already, since these are thrown away."""
        if not self._have_stepped:  # else they have been used, and the other optimizers will use theirs
            self._progress.forget_finished(self._watch.gradients())

    def _position(self) -> Position:
        """Where the step stands, for `_restart_step`."""
        return self._watch.gradients(), self._progress.counted()

    def _restart_step(self, position: Position) -> None:
        """A closure is about to run: forget the forwards since `position`.

        Those before it still count, as they do in gradient accumulation, unless the optimizer itself has thrown their
        gradients away, as SAM does between its two forwards.
        """
        gradients, counted = position
        cleared = gradients != self._watch.gradients() and self._watch.has_no_gradients()
        self._progress.count([] if cleared else counted)
        self._watch.forget()  # the optimizer itself moves parameters between two calls of a closure

    def _stepped(self, optimizer: MaskedOptimizer) -> None:
        """An optimizer has stepped; the step ends when all have."""
        if not self._progress.forwards and self.attached:
            self._watch.warn(
                "idle",
                "the optimizer stepped, but no gated training forward of the attached model came before it: Residual "
                "DropPath had no part in this step. Is the model in eval mode, or was only a part of it called?",
                stacklevel=3,
            )
        self._have_stepped.append(optimizer)
        waiting = [o for o in self._optimizers if o not in self._have_stepped]
        if not waiting or self._have_stepped.count(optimizer) > 1:
            self.advance()
