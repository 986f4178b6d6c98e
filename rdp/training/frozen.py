"""Which parameters do not move in a step: those that no row of it reached the loss through.

A branch is *live* in a step if some row of some forward learns through it; a parameter is frozen if it belongs to
branches only, and none of them is live.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdp.branches import Branch
from rdp.phases import Phase

Gradients = list[tuple[int, int] | None]
"""Of some parameters: which tensor the gradient is, and how often it was written to; None where there is none."""

_PROBES = 8


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one parameter, under one of its names.

    The parameter itself may not be kept: FSDP replaces it when a model is sharded, and again while a module runs.
    """

    name: str
    holder: dict[str, nn.Parameter | None]
    key: str


def slots(model: nn.Module) -> dict[str, Slot]:
    """By name, the places of all parameters; a shared one has several."""
    return {
        name: Slot(name, module._parameters, name.rpartition(".")[2])
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, _ in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
    }


class Frozen:
    """The parameters of the branches, and which of them are frozen in a step.

    Args:
        branches: In forward order, with their rates.
        places: Of all parameters, by name.
    """

    def __init__(self, branches: Sequence[Branch], places: Mapping[str, Slot]) -> None:
        owned = [(index, places[name]) for index, branch in enumerate(branches) for name in branch.parameters]
        self._holders, self._keys = [slot.holder for _, slot in owned], [slot.key for _, slot in owned]
        self._owners = torch.tensor([index for index, _ in owned], dtype=torch.long, device="cpu")
        self._ungated = torch.tensor([not branch.gated for branch in branches], dtype=torch.bool, device="cpu")

        def depth(index: int) -> int:
            return max((1 + depth(around) for around in branches[index].inside), default=0)

        nested = [(i, list(branch.inside)) for i, branch in enumerate(branches) if branch.inside]
        self._nested = sorted(nested, key=lambda pair: depth(pair[0]))

    def live(self, masks: Tensor, phase: Phase, plain: Collection[int] = ()) -> Tensor:
        """Which branches have a row that learns, bool `Tensor[branches]`; see `learning`."""
        return self.learning(masks, phase, plain).any(1)

    def learning(self, masks: Tensor, phase: Phase, plain: Collection[int] = ()) -> Tensor:
        """Which rows learn through which branches, bool `Tensor[branches, rows]`.

        Args:
            masks: Of a forward, bool `Tensor[branches, rows]`.
            phase: Its phase.
            plain: The branches that are not gated in it.
        """
        learning = (~masks if phase is Phase.FREEZE else masks) | self._ungated[:, None]
        for branch in plain:
            learning[branch] = True
        for inner, around in self._nested:
            learning[inner] &= learning[around].any(0)
        return learning

    def rows_learning(self, masks: Tensor, kept: Sequence[int], phase: Phase, plain: Collection[int]) -> Sequence[int]:
        """On how many rows each gated branch learns; `kept` are the numbers of undropped rows, and see `learning`."""
        if self._nested or plain:
            counts: list[int] = self.learning(masks, phase, plain).sum(1).tolist()
            return counts
        return [masks.shape[1] - number for number in kept] if phase is Phase.FREEZE else kept

    def live_in_any(self, forwards: Sequence[Tensor]) -> Tensor:
        """What is live in one of several forwards, each as `live` tells; all, if there are no forwards."""
        if len(forwards) == 1:
            return forwards[0]
        return torch.stack([*forwards] or [torch.ones_like(self._ungated)]).any(0)

    def parameters(self, live: Tensor) -> frozenset[int]:
        """The ids of the parameters that must not move in a step in which these branches are live."""
        if bool(live.all()):
            return frozenset()  # as in most steps of row mode
        ids = [*map(id, self._present())]
        moving = set(itertools.compress(ids, live[self._owners].tolist()))
        return frozenset(ids) - moving - {id(None)}

    def trainable(self) -> list[nn.Parameter]:
        """The parameters of all branches that are trained."""
        return [p for p in self._present() if p is not None and p.requires_grad]

    def _present(self) -> list[nn.Parameter | None]:
        return [*map(dict.get, self._holders, self._keys)]


class Probes:
    """A few parameters, by whose gradients it is seen that a backward ran, or that gradients were thrown away."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._parameters: list[Tensor] = []
        self._branches: list[int] = []
        """If all of them lie in branches: in which."""

    def choose(self, model: nn.Module, branches: Iterable[Branch], held: Mapping[str, Tensor]) -> None:
        """Look at these from now on.

        Args:
            model: Its parameters are registered from stem to head.
            branches: Known or not.
            held: The parameters of wrapped optimizers, by name. FSDP keeps gradients at these, and not at those that
                are in the modules while they run.
        """
        named = {name: held.get(name, p) for name, p in model.named_parameters()}
        trained = {name: p for name, p in named.items() if p.requires_grad} or named
        inside = [[name for name in branch.parameters if name in trained] for branch in branches]
        owned = {name for names in inside for name in names}
        outside = [name for name in trained if name not in owned]
        half = _PROBES // 2
        # Of what learns in every step a few are enough; a branch may be dropped, so without those, one of each.
        firsts = {place: names[0] for place, names in enumerate(inside) if names}
        some = list(firsts.values())
        self.names = outside[:half] + outside[half:][-half:] + some[:: len(some) // half + 1 if outside else 1]
        self._parameters = [trained[name] for name in self.names]
        self._branches = [] if outside else list(firsts)

    def gradients(self) -> Gradients:
        """Their gradients now."""
        gradients = [p.grad for p in self._parameters]
        # Of a DTensor FSDP writes to the local one.
        local = [None if g is None else getattr(g, "_local_tensor", g) for g in gradients]
        return [None if g is None else (id(g), g._version) for g in local]

    def expect_nothing(self, live: Tensor) -> bool:
        """Do none of them get a gradient by a forward of these live branches, though they are trained?

        Then all that is trained lies in branches, of which none is live: the forward teaches nothing, as it should.
        """
        trained = any(p.requires_grad for p in self._parameters)
        return trained and bool(self._branches) and not bool(live[self._branches].any())
