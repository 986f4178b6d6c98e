"""The handle that `attach` returns: what a user sees of a training run and does with it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rdp import choose
from rdp.branches import Branch, Refusal, branch_table
from rdp.calls import Inputs, arguments_of, as_called, telling
from rdp.check import Checkup, check, warn_after_first_cycle
from rdp.distributed.agreement import ShadowHook
from rdp.distributed.ranks import Ranks, check_sharding
from rdp.errors import ArgumentError, AttachError, UnknownAttributeError, warn
from rdp.late import late_branches
from rdp.native import NativeDrop, find_native_drops
from rdp.options import Options
from rdp.phases import Phase
from rdp.proof import Proof, prove
from rdp.rates import as_rate
from rdp.refusals import check_training
from rdp.settle import settle
from rdp.training import compiled, hooks, lesions
from rdp.training.optimizer import MaskedOptimizer
from rdp.training.replaced import Places
from rdp.training.run import Run
from rdp.training.state import load, save


class ResidualDropPath:
    """A model's Residual DropPath: its branches, the phase, the masks. Made by `attach`.

    Printing it shows the table of branches. As a context manager it removes itself on exit.

    Attributes:
        model: The attached model.
        options: What `attach` was asked for.
        refused: Residual sums whose branches cannot be gated soundly, with the reasons.
    """

    def __init__(self, model: nn.Module, options: Options, ranks: Ranks) -> None:
        check_training(model)
        self.model, self.options = model, options
        self.refused: tuple[Refusal, ...] = ()
        self._proof = Proof({}, "no branch is known yet")
        self._found_with: Inputs = (), {}
        self._run = Run(model, options, ranks, self._discover_as_called)
        self._run.first.examine = functools.partial(warn_after_first_cycle, self._run)
        compiled.attached(self._run)
        self._silenced: list[NativeDrop] = find_native_drops(model) if options.native == "off" else []
        for drop in self._silenced:
            drop.silence()
        self._hooks: list[RemovableHandle] = list(hooks.install_on_model(self._run))
        self._places: Places | None = None
        compiled.forget_compiled()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches in forward order, with those of rate 0, which are not gated; empty until they are found."""
        return self._run.branches

    @property
    def attached(self) -> bool:
        """False once removed."""
        return self._run.attached

    @property
    def phase(self) -> Phase:
        """The phase of the current optimizer step."""
        return self._run.phase

    @property
    def step_count(self) -> int:
        """The number of optimizer steps that have ended."""
        return self._run.step.number

    @property
    def rate(self) -> float:
        """The drop rate of the deepest branch, which the schedule of rates multiplies.

        It may be set, to a number in [0, 1); the next DROP and what replays it have the new one.
        """
        return self._run.cycles.rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._check_attached()
        rate = as_rate(rate)
        choose.check_scaling(self.branches, self.options, rate)
        self._run.set_rate(float(rate))

    @property
    def rates(self) -> tuple[float, ...]:
        """The drop rates of the branches in the current cycle, in forward order."""
        return tuple(self._run.step.rates)

    @property
    def masks(self) -> Tensor:
        """The masks of the latest training forward, bool `Tensor[branches, rows]` on the CPU; `True` is undropped."""
        return self._run.masks.clone()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that do not move in the current step, as far as its forwards have shown."""
        frozen = self._run.frozen.parameters(self._run.live())
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
            AttachError: If the handle was removed.
        """
        self._check_attached()
        check_training(self.model)
        wrapped = MaskedOptimizer(optimizer, self)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(id(p) for p in self.model.parameters()):
            raise ArgumentError(
                f"this {type(optimizer).__name__} holds no parameter of the attached {type(self.model).__name__}; "
                "build it from model.parameters() of the very model that was attached"
            )
        self._run.wrapped(wrapped)
        return wrapped

    def advance(self) -> None:
        """End the current optimizer step and go to the next phase; `MaskedOptimizer.step` does so by itself."""
        self._run.announced()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forwards are plain and do not count."""
        with self._run.paused():
            yield

    @contextmanager
    def without(self, branches: lesions.Which) -> Iterator[None]:
        """Within this context these branches contribute nothing; else forwards are plain, as in `paused`. It nests.

        Args:
            branches: Names, or a function of (name, module); if these are none, a `BranchError` says so. A backward
                belongs inside too where activations are checkpointed.
        """
        self._check_attached()
        with lesions.without(self._run, branches), self.paused():
            yield

    def discover(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> None:
        """Find the branches now, from the inputs of a forward; does nothing where they are known.

        Args:
            inputs: As `attach` takes `example_inputs`; in row mode at most two rows are used.

        Raises:
            ArgumentError: If the model does not take `inputs`, they have no rows that could be masked, or a tensor was
                made in inference mode.
            AttachError: If the handle was removed.
            BranchError: If no branch is found, or one that was named is not there.
        """
        self._check_attached()
        self._discover_in(inputs)

    def check(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None) -> Checkup:
        """Examine what has happened since `attach`; call it after a few steps and print the answer.

        Args:
            inputs: Of a forward, as `discover` takes them: the gates are proved on two rows of them, whatever that
                takes, and branches that run besides are named. None: it is reported what the proof has shown that was
                made when branches were found.

        Returns:
            A verdict; what is attached, and on how many rows each branch has learnt; and problems, each with what,
            where and what to do: branches that no forward reached or that lost their hook, phases that do not
            alternate, steps without a training forward, optimizers that are not wrapped, frozen parameters that moved.
        """
        if inputs is not None and self.attached:
            given = self._discover_in(inputs)
            self._proof = prove(self._run, given)
            if self.rate > 0:
                self._look_again(given)
        if self.attached:
            self._run.look()
        return check(self._run, self.refused, self._proof)

    def remove(self) -> None:
        """Take everything out of the model again; it is exactly as before `attach`. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        if self._places is not None:
            self._places.remove()
        for drop in self._silenced:
            drop.restore()
        if self._hooks:
            compiled.detached(self._run)
        self._run.agreement.ranks.leave()
        self._hooks, self._silenced, self._run.attached = [], [], False

    def state_dict(self) -> dict[str, Any]:
        """Counters, seed, rates and rows, as plain numbers: `torch.load(..., weights_only=True)` reads it."""
        return save(self._run)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved; the forwards that it holds count as those that have learnt.

        Before the branches are found it is kept until then. One rank's state does for all, unless they had different
        numbers of micro-batches (or of rows, with `sampling="fixed"`): then each must load what it saved.

        Raises:
            StateError: If the state is of a handle with other branches, rates, phases or another mode, or of another
                number of ranks.
        """
        load(self._run, state)

    def join_hook(self, **kwargs: Any) -> ShadowHook:
        """What `torch.distributed.algorithms.join.Join([ddp_model, handle])` does on ranks that are out of data."""
        self._run.agreement.ranks.connect()
        return ShadowHook(self._run.agreement, lambda: self.step_count, self._skip_to)

    @property
    def join_device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def join_process_group(self) -> Any:
        """The processes that train the model together."""
        return self._run.agreement.ranks.process_group or torch.distributed.group.WORLD

    def __enter__(self) -> ResidualDropPath:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"step {self.step_count}, phase {self.phase.name}" if self.attached else "removed"
        if self.attached and not self.branches:
            state += "; branches will be found in the first training forward"
        now, peak = self._run.step.rate, self.rate
        changes = now != peak or self.options.rate_schedule is not None
        rate = f"rate={peak}{f', now {now:.3g}' if changes else ''}"
        head = f"ResidualDropPath({type(self.model).__name__}, {rate}, mode={self.options.mode!r}): "
        table = branch_table(self.branches, self.refused, self.rates if changes else None)
        return head + state + (f"\n{table}\n{self._proof}" if self.branches else "")

    def __setattr__(self, name: str, value: object) -> None:
        if not (name.startswith("_") or name in ("model", "options", "refused") or hasattr(type(self), name)):
            # It would be accepted and do nothing.
            raise UnknownAttributeError(f"a ResidualDropPath has no {name!r} to set; only handle.rate can be changed")
        super().__setattr__(name, value)

    def _discover_in(self, inputs: Any) -> Inputs:
        given = arguments_of(inputs)
        with telling(self.model, given, "example_inputs"):
            self._discover(*given)
        return given

    def _discover_as_called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with as_called():
            self._discover(args, kwargs)

    def _discover(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.branches:
            return
        choose.check_unattached(self.model, besides=self._run)
        check_training(self.model)
        check_sharding(self.model, self._run.agreement.ranks)
        settled = settle(self._run, (args, kwargs))
        choice, self._proof, self._places = settled.choice, settled.proof, settled.places
        self._silenced += settled.silenced
        self.refused, self._found_with = choice.refused, choice.found_with
        self._run.expected, self._run.look, self._run.look_again = None, settled.places.look, self._look_again
        self._run.watch.unused = choice.unused
        for text in choice.warnings:
            warn(text)
        compiled.forget_compiled()

    def _look_again(self, inputs: Inputs | None) -> None:
        self._run.watch.come_late(late_branches(self._run, inputs or self._found_with))

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError(
                f"this handle was removed from its {type(self.model).__name__}; attach again with rdp.attach(model)"
            )

    def _skip_to(self, step: int) -> None:
        if step > self.step_count:
            # What others drew in DROP is not known, but forward k has draw k unless one was thrown away.
            self._run.go_to(step, {})

    @property
    def _join_config(self) -> Any:
        """Set by `Join`."""
        return self._run.agreement.join_config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self._run.agreement.join_config = config
