"""One optimizer step: its forwards, which of them count for it, and the masks that the next step replays.

A training forward counts when a backward has reached it and its gradients are still there when the step ends. Nobody
has to announce that a batch was thrown away: it is seen on the graph of the forward and on the model's gradients.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rdp.distributed.ranks import Question
from rdp.phases import Phase
from rdp.rows.branch import Split
from rdp.training.frozen import Gradients, Probes


@dataclass(frozen=True)
class Draw:
    """Which masks a forward has: with the seed and the cycle, all that it takes to draw them again."""

    number: int
    """The position in its step of the DROP forward that was first to have them."""
    rows: int
    """How many rows that forward had."""
    masks: Tensor | None = field(default=None, compare=False, repr=False)
    """The masks of these rows, if they were drawn in this process; do not write to them."""


class Forward:
    """One training forward: its masks, and what has become of it since.

    Args:
        phase: DROP, FREEZE or PLAIN.
        position: In its step; FREEZE gives position k the masks that DROP had there.
        draw: Which masks it has.
        masks: Bool `Tensor[branches, rows]` on the CPU; `True` is undropped.
        live: Bool `Tensor[branches]`: has a row that learns through the branch.
        plain: The branches whose blocks are in eval mode now.

    Attributes:
        rows: The number of rows of the batch.
        kept: How many of them are undropped, for each branch.
        question: What the other ranks were asked as it began, if they were.
        graph: Returns something for as long as its graph is alive; None before there is one.
        running: Has it begun, and not ended?
        differentiated: Has `torch.autograd.grad` reached it, with `create_graph`, for a loss that is made of gradients?
        learnt: Has a backward reached it, and made gradients?
        used: Has an optimizer stepped on these?
        spent: Is it over for good: interrupted, or thrown away with its gradients?
        reached: The branches whose gates were called in it, by Python.
        nodes: The numbers of the autograd nodes that it made, from the first up to, without, the second.
    """

    def __init__(
        self, phase: Phase, position: int, draw: Draw, masks: Tensor, live: Tensor, plain: Collection[int] = ()
    ) -> None:
        self.phase = phase
        self.position = position
        self.draw = draw
        self.masks = masks
        self.live = live
        self.plain = plain
        self.rows = masks.shape[1]
        self.kept: list[int] = masks.sum(1).tolist()
        self.question: Question | None = None
        self.graph: Callable[[], Any] | None = None
        self.running = self.differentiated = self.learnt = self.used = self.spent = False
        self.reached: set[int] = set()
        self.nodes = (0, 0)
        self.handling = id(sys.exception())  # a reference would keep all the tensors of its traceback
        self._on_device: dict[tuple[str, torch.device], tuple[Tensor, ...]] = {}

    @property
    def may_learn(self) -> bool:
        """Is it running, or its graph alive?"""
        return self.running or self.differentiated or (self.graph is not None and self.graph() is not None)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"graph": None, "question": None}  # a copy is of no graph, and asks no rank

    def keep(self, branch: int, device: torch.device) -> Tensor:
        """The mask of a branch, bool `Tensor[rows]` on `device`; all branches are copied at the first request."""
        if ("masks", device) not in self._on_device:
            self._on_device["masks", device] = (
                self.masks if device.type == "cpu" else sent(self.masks, device)
            ).unbind(0)
        return self._on_device["masks", device][branch]

    def split(self, branch: int, device: torch.device) -> Split:
        """The undropped and the dropped rows of a branch, on `device`; all branches are copied at the first request."""
        if ("rows", device) not in self._on_device:
            self._on_device["rows", device] = sent(order(self.masks), device).unbind(0)
        rows = self._on_device["rows", device][branch]
        return Split(rows[: self.kept[branch]], rows[self.kept[branch] :])


class Step:
    """The forwards of one optimizer step, and what is known of them; the next step is another object.

    Args:
        number: How many steps have ended before.
        phase: What it does; PLAIN in a cycle whose rate is 0.
        cycle: Of its masks.
        probes: Some of the model's parameters.
        replay: What the forwards of the latest DROP step have drawn, by position.
        given: The masks of its forwards, if they are not to be drawn.
        rate: Of the deepest branch in this cycle.
        rates: Of all branches.

    Attributes:
        replayed: In FREEZE, what is drawn at a position: as DROP drew there or, where an early one was left empty, at a
            late one.
        forwards: Those that count, or still may.
        replayed_rows: How many rows each of these has; 0 if not all have the same number, None if there are none.
        settled: Those that counted when an optimizer was last about to step.
        stepped: The optimizers that have stepped; plain ones, since one may be wrapped again.
        agreed: Bool `Tensor[branches]`: those that are live on any rank; None before the ranks have agreed.
        comes: Called with a forward when a backward comes to it, and with None when that is over.
    """

    def __init__(
        self,
        number: int,
        phase: Phase,
        cycle: int,
        probes: Probes,
        replay: Mapping[int, Draw],
        given: Tensor | None = None,
        rate: float = 0.0,
        rates: Sequence[float] = (),
    ) -> None:
        self.number = number
        self.phase = phase
        self.cycle = cycle
        self.replay = replay
        self.given = given
        self.rate = rate
        self.rates = rates
        drawn = replay if phase is Phase.FREEZE else {}
        late = iter(sorted(drawn.keys() - set(range(len(drawn)))))
        self.replayed = {place: drawn.get(place) or drawn[next(late)] for place in range(len(drawn))} | {**drawn}
        rows = {draw.rows for draw in self.replayed.values()}
        self.replayed_rows = (rows.pop() if len(rows) == 1 else 0) if rows else None
        self.forwards: list[Forward] = []
        self.settled: list[Forward] = []
        self.stepped: list[Optimizer] = []
        self.agreed: Tensor | None = None
        self.comes: Callable[[Forward | None], object] = bool
        self._probes = probes
        self._backward, self._creates_graph = -1, False
        self._before: Gradients = []
        self._after: Gradients = []
        """The gradients as the latest backward left them."""
        self._reached: list[Forward] = []
        """The forwards that the present backward has come to."""
        self._untaught: list[Forward] = []
        """Those that a backward came to without making gradients."""

    def place(self) -> int:
        """The position of a forward that begins now: the lowest that none holds."""
        learning = not self._changed(self._probes.gradients())
        self.forwards = [f for f in self.forwards if f.learnt or f.may_learn]
        held = {f.position for f in self.forwards if f.used or (not f.spent and (learning or not f.learnt))}
        return next(position for position in itertools.count() if position not in held)

    def mark(self, forward: Forward, tensor: Tensor) -> None:
        """Notice when a backward comes to `tensor`, which was made by `forward`, and when its graph is gone."""
        # An in-place write to a view replaces its node, but not that of what it is a view of.
        base = tensor._base
        if (node := (None if base is None else base.grad_fn) or tensor.grad_fn) is not None:
            mark = forward.graph() if forward.graph is not None else None
            if mark is None:
                mark = functools.partial(self.reached, forward)  # kept by the node alone, so that both end together
                forward.graph = weakref.ref(mark)
            node.register_prehook(mark)

    def reached(self, forward: Forward, *_: object) -> None:
        """A backward has come to a forward."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward, self._before, self._reached = backward, self._probes.gradients(), []
            self._creates_graph = torch.is_grad_enabled()
            if self._changed(self._before):
                for earlier in self.forwards:
                    earlier.spent |= earlier.learnt and not earlier.used
            # In two turns: DistributedDataParallel and FSDP write gradients in such a callback, queued meanwhile.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._backward_ends))
        if forward not in self._reached:
            self._reached.append(forward)
            self.comes(forward)

    def counted(self) -> list[Forward]:
        """The forwards that count, as far as can be told now."""
        now = self._probes.gradients()
        learnt = [f for f in self.forwards if (f.learnt and not f.spent) or (f.differentiated and any(now))]
        if any(self._after) and not any(now):
            return [forward for forward in learnt if forward.used]
        by_hand = (new is not None and new[0] != (old or (0,))[0] for old, new in zip(self._after, now, strict=False))
        # Where nothing has learnt otherwise, these gradients were computed by `torch.autograd.grad`.
        return learnt or (self._untaught if any(by_hand) else [])

    def learnt(self) -> list[tuple[int, int]]:
        """The position and the number of rows of each forward that counts."""
        return [(forward.position, forward.rows) for forward in self.counted()]

    def draws(self) -> Mapping[int, Draw]:
        """What the steps after this one replay, by position."""
        if self.phase is not Phase.DROP:
            return self.replay
        return {f.draw.number: f.draw for f in sorted(self.forwards, key=lambda f: f.position) if f.used}

    def _changed(self, now: Gradients) -> bool:
        """Has something else than a backward changed or cleared the gradients, all of them?"""
        pairs = zip(self._after, now, strict=False)
        return any(self._after) and not any(old is not None and old == new for old, new in pairs)

    def _backward_ends(self) -> None:
        self.comes(None)
        self._after = self._probes.gradients()
        taught = self._after != self._before
        # Where gradients are differentiated again, the backward does not come by the end of their forward.
        for forward in [*self._reached, *(f for f in self.forwards if taught and f.differentiated)]:
            forward.differentiated = self._creates_graph and not taught
            if taught or self._probes.expect_nothing(forward.live):
                forward.learnt, forward.spent = True, False
            elif not forward.differentiated:
                self._untaught.append(forward)


def order(masks: Tensor) -> Tensor:
    """Of each branch the undropped rows, and then the others, int64 `Tensor[branches, rows]`."""
    return torch.argsort(masks.to(torch.int8), dim=1, descending=True, stable=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, which the host does not wait for, if that can be had."""
    return tensor.pin_memory().to(device, non_blocking=True) if copies_from_pinned(device.type) else tensor.to(device)


@functools.cache
def copies_from_pinned(kind: str) -> bool:
    """Do devices of this kind copy by themselves, from memory that torch can pin for them?"""
    try:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or accelerator.type != kind:
            return False
        torch.empty(1).pin_memory()
    except RuntimeError:  # a backend need not have it; torch 2.6 raises where there is no accelerator
        return False
    return True


def next_node() -> int:
    """The number that the next node of the autograd graph will get, give or take this one."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr()) if node is not None else 0
