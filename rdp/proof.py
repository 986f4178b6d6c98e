"""Proving the gates on a model's own input, by what must hold whatever the model is.

1. In FREEZE the output is the plain output, for any split of the rows.
2. What reaches the loss through frozen branches alone gets no gradient.
3. The mask of one row changes no other row.
4. What is in eval mode, or runs without gradients, is plain in DROP too.

Two rows of the input go through the model, or all of it where batch mode knows of no rows, with the very hooks that
training uses and with masks made for the purpose. Dropout is off meanwhile, and normalisations use their running
statistics, so that the rows stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rdp import frames, trees
from rdp.branches import RowAxis
from rdp.discovery import forwards
from rdp.discovery.forwards import Inputs
from rdp.inputs import fresh
from rdp.phases import Phase
from rdp.rehearsal import as_trained, grounds, operations, rehearsal
from rdp.rows.axes import layouts_of, row_axis, row_of_two
from rdp.rows.verify import close
from rdp.training.run import Run

BUDGET = 1e11
"""Models whose forward of two rows takes more floating point operations than this are not proved without being asked.

ResNet-50 takes 16e9 at 224 pixels, ViT-B 70e9; the proof takes as much as some seven such forwards."""


@dataclass(frozen=True)
class Proof:
    """What a proof has shown.

    Attributes:
        violations: By name of the branch, what does not hold.
        missing: Why it was not made, or not to its end; "" if it was.
        idle: Names of branches that take part in the rates, but whose calls in training all run without gradients.
        on: What it was made on.
    """

    violations: Mapping[str, str]
    missing: str = ""
    idle: tuple[str, ...] = ()
    on: str = "two rows of the input"

    def __str__(self) -> str:
        return f"not proved: {self.missing}" if self.missing else f"proved on {self.on}"


def prove(run: Run, inputs: Inputs, budget: float | None = None) -> Proof:
    """Prove the gates of a run, whose hooks are in its model.

    Random numbers, buffers, gradients, modes, counters and attributes of the model are left as they were, and no other
    process is asked for anything.

    Args:
        run: That of the model.
        inputs: Of a forward; two rows of them are used, if it is known where they are.
        budget: In floating point operations of a forward; None: any number.
    """
    if not any(branch.gated for branch in run.branches):
        return Proof({}, "nothing is gated")
    if budget is not None and forwards.only_device(run.model) is None:
        return Proof({}, "the model is sharded, offloaded, quantized or has hooks of others, see handle.check(inputs)")
    proof = Proof({}, "it is not known where the rows of the input are")
    for on, given, alone in grounds(run, inputs):
        try:
            # A checkpoint around the model must not take what is kept for a proof for its own.
            own_tensors = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
            with as_trained(run.model), torch.inference_mode(False), torch.enable_grad(), own_tensors:
                if budget is not None and (taken := operations(run, given)) > budget:
                    what = "the input takes" if alone is None else "two rows take"
                    return Proof({}, f"{what} {taken:.1e} operations; handle.check(inputs) proves it all the same")
                return replace(_Trial(run, given, alone).proof(), on=on)
        except Exception as error:  # a proof may fail, but not the training that it is for
            first = str(error).partition("\n")[0]
            proof = Proof({}, f"a forward for it raised {type(error).__name__}: {first}")
    return proof


class _Trial:
    """Forwards with given masks, of two rows and of the first alone, or of all in one; and what they show."""

    def __init__(self, run: Run, pair: Inputs, single: Inputs | None) -> None:
        self.run = run
        self.pair = pair
        self.gated = [index for index, branch in enumerate(run.branches) if branch.gated]
        blocks = [run.model.get_submodule(branch.block) for branch in run.branches]
        self.still = [i for i, b in enumerate(run.branches) if b.idle or not blocks[i].training]
        self.parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        halves = {p.dtype for p in run.model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        autocast = {p.device.type for p in run.model.parameters() if torch.is_autocast_enabled(p.device.type)}
        self.half = next(iter(halves), torch.bfloat16 if autocast else None)
        """What numbers were made in, however exact they look now."""
        self.parts: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
        self._step = run.step
        """That of the latest forward."""
        with self._recorded():
            self.plain = self._outputs(None, None, pair)
        self.rows: list[RowAxis | None] = [None] * len(self.plain)
        if single is not None:
            alone = self._outputs(None, None, single)
            self.rows = [self._rows(two, one) for two, one in zip(self.plain, alone, strict=True)]
        self.apart = run.options.mode == "row" and any(axis is not None for axis in self.rows)
        """Are there outputs of each row by itself? If not, all rows have the same masks."""

    def _rows(self, two: Tensor, one: Tensor) -> RowAxis | None:
        """Where an output of two rows has its rows, if the first is what that row alone gives."""
        where = row_axis(two.shape, one.shape)
        if where is None or not two.is_floating_point():
            return None
        fitting = [rows for rows in layouts_of(where) if self._same(row_of_two(two, rows, 0), one)]
        return fitting[0] if len(fitting) == 1 else None

    def proof(self) -> Proof:
        """Look at one law after the other, until one does not hold."""
        run = self.run
        if not all(x.isfinite().all() for x in self.plain if x.is_floating_point()):
            return Proof({}, "values are not finite")
        laws = [self._drop]
        if Phase.FREEZE in run.options.phases and run.options.freeze == "output":
            laws.append(self._freeze)
        for law in laws:
            if violations := law():
                again = self._outputs(None, None, self.pair)
                if not self._equal(again, self.plain):
                    return Proof({}, "the model gives different numbers for the same input")
                return Proof({run.branches[index].name: why for index, why in violations.items()})
        without = [i for i, calls in sorted(self.gradients.items()) if not any(calls) and i not in self.still]
        return Proof({}, idle=tuple(run.branches[index].name for index in without))

    def _drop(self) -> dict[int, str]:
        """Laws 3 and 4, and law 2 in DROP: the branches that break one, with what is wrong."""
        masks = self._masks()
        masks[:, 0] = torch.rand(len(masks), generator=_generator(0), device="cpu") < 0.5
        masks[self.still, 0] = False
        if not self.apart:
            masks[:, 1] = masks[:, 0]
        with self._recorded():
            outputs = self._outputs(Phase.DROP, masks, self.pair, keep_graph=True)
        if different := self._parts_that_differ():
            return dict.fromkeys(different, "it does not train, but is dropped")
        if not self.apart:
            return self._learn_all_the_same(outputs, masks, Phase.DROP, 0)
        kept = self._outputs(Phase.DROP, self._masks(), self.pair) if self.run.options.scale_by_keep else self.plain

        def holds(suspects: Collection[int]) -> bool:
            masks = self._masks()
            masks[list(suspects), 0] = False
            return self._equal(self._outputs(Phase.DROP, masks, self.pair), kept, 1)

        if not self._equal(outputs, kept, 1):
            return dict.fromkeys(_culprits(self.gated, holds), "its mask for one row changes another row")
        return self._learn_all_the_same(outputs, masks, Phase.DROP, 0)

    def _freeze(self) -> dict[int, str]:
        """Laws 1 and 2: the branches that break one, with what is wrong."""

        def masks_of(suspects: Sequence[int]) -> Tensor:
            masks = self._masks()
            if self.run.options.mode == "row":
                masks[list(suspects), 0] = False
            return masks

        def holds(suspects: Sequence[int]) -> bool:
            return self._equal(self._outputs(Phase.FREEZE, masks_of(suspects), self.pair), self.plain)

        masks = masks_of(self.gated)
        outputs = self._outputs(Phase.FREEZE, masks, self.pair, keep_graph=True)
        if not self._equal(outputs, self.plain):
            return dict.fromkeys(_culprits(self.gated, holds), "in FREEZE the output is not that of the plain network")
        if not self.apart:  # a loss of one row alone would be one of the other row too
            masks = self._masks()
            outputs = self._outputs(Phase.FREEZE, masks, self.pair, keep_graph=True)
        return self._learn_all_the_same(outputs, masks, Phase.FREEZE, 1)

    def _masks(self) -> Tensor:
        return torch.ones(len(self.run.branches), 2, dtype=torch.bool, device="cpu")

    def _outputs(
        self, phase: Phase | None, masks: Tensor | None, inputs: Inputs, keep_graph: bool = False
    ) -> list[Tensor]:
        """The output tensors of a forward with these masks; a plain one without."""
        args, kwargs = fresh(inputs)
        run, gradients = self.run, torch.set_grad_enabled(phase is not None)
        with forwards.own_random_numbers(run.model), rehearsal(run, phase, masks), gradients:
            self._step = run.step
            output = run.model(*args, **kwargs)
        return [x if keep_graph else x.detach().clone() for x in trees.tensors(output)]

    def _equal(self, found: list[Tensor], wanted: list[Tensor], row: int | None = None) -> bool:
        """Are outputs equal, to rounding? Of one row, those that have rows."""
        pairs = zip(found, wanted, self.rows, strict=True)
        if row is None:
            return all(self._same(one, other) for one, other, _ in pairs)
        return all(
            self._same(row_of_two(a, axis, row), row_of_two(b, axis, row)) for a, b, axis in pairs if axis is not None
        )

    def _same(self, found: Tensor, wanted: Tensor) -> bool:
        if not wanted.is_floating_point():
            return found.shape == wanted.shape  # a class, say, which rounding can turn over
        dtype = self.half or wanted.dtype
        return close(found.detach().to(dtype), wanted.to(dtype))

    def _learn_all_the_same(self, outputs: list[Tensor], masks: Tensor, phase: Phase, row: int) -> dict[int, str]:
        """Law 2, for a loss made of one row, or of all if these cannot be told apart: what breaks it."""
        run, loss = self.run, torch.zeros((), device="cpu")
        if self.apart:
            masks = masks[:, row : row + 1]
        live = run.frozen.live(masks, phase, self.still)
        frozen = run.frozen.parameters(live)
        names = [name for name, p in self.parameters.items() if id(p) in frozen]
        for x, axis in zip(outputs, self.rows, strict=True):
            if x.requires_grad and (axis is not None or not self.apart):
                part = x if axis is None or not self.apart else row_of_two(x, axis, row)
                weights = torch.randn(part.shape, generator=_generator(1), device="cpu")
                loss = loss.to(x.device) + (part * weights.to(part)).sum()
        if not names or not loss.requires_grad:
            return {}
        step, run.step = run.step, self._step  # a checkpoint calls modules again, for that forward
        try:
            gradients = torch.autograd.grad(loss, [self.parameters[name] for name in names], allow_unused=True)
        finally:
            run.step = step
        learning = [n for n, g in zip(names, gradients, strict=True) if g is not None and (g.nan_to_num(0) != 0).any()]
        owners = {name: [i for i in self.gated if name in run.branches[i].parameters] for name in learning}
        by_number = sorted(learning, key=lambda name: -len(owners[name]))  # what is shared says the least
        return {i: f"`{name}` learns by a way around the gate" for name in by_number for i in owners[name]}

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep what the blocks of branches that do not train are given and return, and who is called with gradients."""
        run = self.run
        self.gradients: dict[int, list[bool]] = {}

        def note(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                comes = torch.is_grad_enabled() or any(map(frames.is_autograd_function, frames.callers()))
                self.gradients.setdefault(index, []).append(comes)

            return hook

        still = {run.branches[index].block for index in self.still}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given = [x.detach().clone() for x in trees.tensors((args, kwargs))]
                made = [x.detach().clone() for x in trees.tensors(output)]
                self.parts.setdefault(name, []).append((given, made))

            return hook

        modules = [(name, run.model.get_submodule(name)) for name in sorted(still) if name]
        hooks = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules]
        for index, branch in enumerate(run.branches):  # those of rate 0 count as well where rates grow with depth
            for gate in branch.gates:
                hooks.append(run.model.get_submodule(gate.module).register_forward_hook(note(index)))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _parts_that_differ(self) -> list[int]:
        """Law 4: branches whose blocks, recorded twice, made other outputs of the same inputs."""
        different = set()
        for name, records in self.parts.items():
            half = len(records) // 2
            for (given, made), (again, other) in zip(records[:half], records[half:], strict=False):
                if all(map(torch.equal, given, again)) and not all(map(torch.equal, made, other)):
                    different.add(name)
        return [index for index in self.gated if self.run.branches[index].block in different]


def _culprits(suspects: list[int], holds: Callable[[list[int]], bool]) -> list[int]:
    """Of branches that break a law together those that break it alone; all of them if none does."""
    if len(suspects) == 1:
        return suspects
    middle = len(suspects) // 2
    halves = [half for half in (suspects[:middle], suspects[middle:]) if not holds(half)]
    return [index for half in halves for index in _culprits(half, holds)] or suspects


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)  # whatever the default device is
