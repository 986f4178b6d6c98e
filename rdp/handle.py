"""The handle that `attach` returns: the one object that holds hooks, phases and masks together."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rdp import gates, setup, traced
from rdp.branches import Branch, Refusal, branch_table
from rdp.discovery.program import Program
from rdp.discovery.trace import tensors_in
from rdp.errors import ArgumentError, BranchError, ForwardError, RdpWarning
from rdp.forward import Forward, Forwards, in_backward
from rdp.hooks import BeginHook, EndHook, EntryHook, GateHook, LaterHook
from rdp.native import NativeDrop, find_native_drops
from rdp.optim import MaskedOptimizer
from rdp.options import Options
from rdp.phases import Phase, Schedule
from rdp.progress import Progress
from rdp.rows import BranchOnRows


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

    def __init__(self, model: nn.Module, options: Options) -> None:
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
        self._warned_stray = self._warned_unannounced = self._warned_idle = False
        self._silenced: list[NativeDrop] = find_native_drops(model) if options.native == "off" else []
        for drop in self._silenced:
            drop.silence()
        self._by_branch: list[list[nn.Parameter]] = []
        self._probes: list[nn.Parameter] = []
        self._versions: Hashable = None
        self._ranks = 1
        self._key = traced.register(self)
        self._traced_masks: Tensor | None = None
        self._traced_phase = self.phase
        self._optimizers: list[MaskedOptimizer] = []
        self._have_stepped: list[MaskedOptimizer] = []
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(BeginHook(self), with_kwargs=True, prepend=True),
            model.register_forward_hook(EndHook(self), always_call=True),
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
        mine = {id(p) for p in self.model.parameters()}
        if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            raise ArgumentError(
                f"this {type(optimizer).__name__} holds no parameter of the attached {type(self.model).__name__}; "
                "build it from model.parameters() of the very model that was attached"
            )
        self._optimizers.append(wrapped)
        return wrapped

    def advance(self) -> None:
        """End the current optimizer step and go to the next phase; `MaskedOptimizer.step` does so by itself."""
        self._progress.advance()
        self._traced_phase = self.phase
        self._forwards.forget()
        self._have_stepped.clear()
        self._versions = None

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
            BranchError: If none is found, or one that was named is not there.
        """
        if isinstance(inputs, Mapping):
            self._discover((), inputs)
        else:
            self._discover(inputs if isinstance(inputs, tuple) else (inputs,), {})

    def remove(self) -> None:
        """Take everything out of the model again; it is exactly as before `attach`. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        for drop in self._silenced:
            drop.restore()
        if self._hooks:
            traced.forget_compiled()
        self._hooks, self._silenced, self.attached = [], [], False

    def state_dict(self) -> dict[str, Any]:
        """Counters, seed and masks, as tensors and plain numbers: `torch.load(..., weights_only=True)` reads it."""
        return self._pending_state if self._pending_state is not None else self._progress.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved; before the branches are found it is kept until then.

        Raises:
            StateError: If the state is of a handle with other branches, rates, phases or another mode.
        """
        if self.branches:
            self._progress.load_state_dict(state)
            self._traced_phase = self.phase
            self._forwards.forget()
            self._versions = None
        else:
            self._progress.step_count = int(self._progress.check(state)["step_count"])
            self._pending_state = state

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
        return Progress(self._schedule, branches, seed=options.seed, mode=options.mode, one_draw=one_draw)

    def _discover(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.branches:
            return
        setup.check_unattached(self.model, besides=self)
        with self.paused():
            branches, refused, programs = setup.choose_branches(self.model, self.options, args, kwargs)
        progress = self._new_progress(branches)
        progress.step_count = self._progress.step_count
        if self._pending_state is not None:
            progress.load_state_dict(self._pending_state)
        self.branches, self.refused = branches, refused
        self._progress, self._pending_state = progress, None
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._by_branch = [[parameters[name] for name in branch.parameters] for branch in self.branches]
        inside = {id(p) for group in self._by_branch for p in group}
        outside = [p for p in parameters.values() if p.requires_grad and id(p) not in inside]
        self._probes = (outside[:4] + outside[-4:]) or list(parameters.values())[:8]
        for index, branch in enumerate(self.branches):
            if branch.rate > 0:
                self._hook_branch(index, branch, programs.get(branch.name))
        self._traced_phase = self.phase
        traced.forget_compiled()

    def _hook_branch(self, index: int, branch: Branch, program: Program | None) -> None:
        keep_prob = 1 - branch.rate if self.options.scale_by_keep else None
        on_rows = BranchOnRows(self.model, program) if program is not None else None
        if program is not None and on_rows is not None:
            entry = self.model.get_submodule(program.entry)
            self._hooks.append(
                entry.register_forward_pre_hook(EntryHook(self, index, on_rows), with_kwargs=True, prepend=True)
            )
            for name in program.later_modules:
                hook = LaterHook(self, name, on_rows)
                self._hooks.append(self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for point in branch.gates:
            gate = GateHook(self, index, point, keep_prob, on_rows)
            self._hooks.append(self.model.get_submodule(point.module).register_forward_hook(gate))

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module is not self.model:
            raise ForwardError(
                f"this {type(module).__name__} is a replica or a shallow copy of the attached model, as "
                "torch.nn.DataParallel makes them. Use DistributedDataParallel, or attach to the copy itself"
            )
        self._traced_masks = None
        if self._pauses or not module.training or not torch.is_grad_enabled():
            self._forwards.begin(None)
            return
        if in_backward():
            self._forwards.begin(self._recomputed_forward())
            return
        try:
            rows = setup.check_inputs(args, kwargs)
            if not self.branches:
                self._discover(args, kwargs)
        except BaseException:
            self._forwards.begin(None)  # EndHook is called even so
            raise
        masks = self._draw_masks(rows)
        self._forwards.begin(Forward(self.phase, masks))
        if traced.may_be_compiled():  # parts of the model, while the model itself is called by Python
            self._traced_masks = masks.to(self._probes[0].device, non_blocking=True)

    def _begin_traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """`_begin_forward` as torch.compile sees it."""
        self._traced_masks = None
        if self._pauses or not self.model.training or not torch.is_grad_enabled():
            return
        if not self.branches:
            raise BranchError(
                "the model is compiled before its branches are known; pass example_inputs to rdp.attach, or call "
                "handle.discover(inputs), so that they are found beforehand"
            )
        x = next(tensor for tensor in tensors_in((args, kwargs)) if tensor.dim())
        masks = traced.begin_forward(x.detach(), self._key, len(self.branches))
        self._traced_masks = masks.to(x.device, non_blocking=True)

    def _draw_masks(self, rows: int) -> Tensor:
        """Begin a forward of `rows` rows; its masks."""
        self._warn_if_unannounced()
        rank, self._ranks = setup.rank_and_ranks()
        return self._progress.begin_forward(rows, rank, self._ranks, gradients=self._gradient_state())

    def _recomputed_forward(self) -> Forward:
        forward = self._forwards.recomputed()
        if forward is None:
            self._forwards.begin(None)  # EndHook is called even so
            raise ForwardError(
                "the whole model is recomputed by a checkpoint with use_reentrant=True, whose first forward runs "
                "without gradients and was taken for a plain one. Pass use_reentrant=False, or checkpoint its blocks"
            )
        return forward

    def _end_forward(self, output: Any) -> Any:
        forward = self._forwards.end()
        self._traced_masks = None
        if forward is None or not torch.is_grad_enabled():
            return None
        tensors = list(tensors_in(output))
        leaf = next((i for i, tensor in enumerate(tensors) if tensor.is_floating_point()), None)
        if leaf is None or (self._ranks == 1 and any(tensor.requires_grad for tensor in tensors)):
            return None
        # Without this, a backward of nothing but frozen branches has no graph, and DistributedDataParallel waits for
        # the gradients of branches that are out of the graph on this rank.
        parameters = [p for group in self._by_branch for p in group if p.requires_grad]
        linked = gates.link(tensors[leaf], parameters)
        return linked if isinstance(output, Tensor) else gates.replace_leaf(output, leaf, linked)

    def _frozen_parameters(self) -> set[int]:
        """The ids of the parameters that must not move in this step."""
        live = self._progress.live().tolist()
        moving = {id(p) for alive, group in zip(live, self._by_branch, strict=True) if alive for p in group}
        return {id(p) for group in self._by_branch for p in group} - moving

    def _restart_step(self, only_finished: bool = False) -> None:
        """Forget the forwards of this step, or those of them whose gradients exist already."""
        self._progress.forget_forwards(self._gradient_state() if only_finished else None)
        if not only_finished:
            self._versions = None  # the optimizer itself moves parameters between two calls of a closure

    def _stepped(self, optimizer: MaskedOptimizer) -> None:
        """An optimizer has stepped; the step ends when all have."""
        if not self._progress.forwards and self.attached and not self._warned_idle:
            self._warned_idle = True
            warnings.warn(
                "the optimizer stepped, but no gated training forward of the attached model came before it: Residual "
                "DropPath had no part in this step. Is the model in eval mode, or was only a part of it called?",
                RdpWarning,
                stacklevel=3,
            )
        self._have_stepped.append(optimizer)
        waiting = [o for o in self._optimizers if o not in self._have_stepped]
        if not waiting or self._have_stepped.count(optimizer) > 1:
            self.advance()

    def _gradient_state(self) -> Hashable:
        return tuple(None if p.grad is None else (id(p.grad), p.grad._version) for p in self._probes)

    def _warn_if_unannounced(self) -> None:
        versions = tuple(p._version for p in self._probes)
        moved = self._versions is not None and versions != self._versions
        self._versions = versions
        if moved and not self._have_stepped and not self._warned_unannounced:
            self._warned_unannounced = True
            warnings.warn(
                f"parameters have changed since the last training forward, but the phase is still {self.phase.name}: "
                "no step was announced, so DROP and FREEZE do not alternate. Step the optimizer that handle.wrap(...) "
                "returned, or call handle.advance() after each step",
                RdpWarning,
                stacklevel=4,
            )
