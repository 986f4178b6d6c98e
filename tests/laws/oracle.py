"""The oracle: Algorithm 1 of Park (2024) written out add by add. It shares no code with the library.

A residual add of a generated architecture (`laws.architectures`) calls `Adds.add` where the plain forward writes `+`.
Which rows are dropped is an input, never drawn here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


class Adds:
    """The residual adds of one oracle forward, in forward order.

    Args:
        masks: bool `Tensor[branches, rows]`, `True` = undropped; `None` = a plain forward of any number of branches.
        phase: `"DROP"`, `"FREEZE"` or `"PLAIN"`.
        rates: drop probability of each branch.
        freeze: `"output"` or `"params"`.
        scale_by_keep: divide the undropped rows of DROP by their keep probability.
    """

    def __init__(
        self,
        masks: Tensor | None,
        phase: str,
        rates: Sequence[float] | None,
        freeze: str = "output",
        scale_by_keep: bool = False,
    ) -> None:
        self.masks, self.phase, self.rates = masks, phase, rates
        self.freeze, self.scale_by_keep = freeze, scale_by_keep
        self.owned: list[list[nn.Module | nn.Parameter]] = []

    def add(
        self,
        shortcut: Tensor,
        branch: Callable[[], Tensor],
        own: Iterable[nn.Module | nn.Parameter],
        shared: Iterable[nn.Module | nn.Parameter] = (),
        axis: int = 0,
        repeat: int = 1,
    ) -> Tensor:
        """One residual add, `S(x) + F(x)`, as its phase defines it. Adds that share their weights share their mask.

        Args:
            shortcut: `S(x)`.
            branch: computes `F(x)`.
            own: what holds the parameters used by this branch alone.
            shared: what holds the parameters used by this and other branches, and by nothing else.
            axis: the axis of `F(x)` that holds the rows.
            repeat: how many consecutive entries of that axis belong to one row.
        """
        own = list(own)
        n = next((n for n, owners in enumerate(self.owned) if owners[0] is own[0]), len(self.owned))
        if n == len(self.owned):
            self.owned.append([*own, *shared])
        if self.masks is None or self.phase == "PLAIN" or self.rates[n] == 0:
            return shortcut + branch()

        rows = self.masks[n]
        if self.phase == "FREEZE" and self.freeze == "params":
            assert rows.all() or not rows.any(), "freezing parameters is defined for whole batches only"
            with constant(own) if rows.all() else contextlib.nullcontext():
                f = branch()
            return shortcut + f

        f = branch()
        m = rows.repeat_interleave(repeat).to(f.dtype)
        m = m.reshape([-1 if d == axis else 1 for d in range(f.dim())])
        if self.phase == "FREEZE":
            return shortcut + m * f.detach() + (1 - m) * f
        if self.scale_by_keep:
            m = m / (1 - self.rates[n])
        return shortcut + m * f

    def finish(self) -> None:
        assert self.masks is None or len(self.owned) == len(self.masks), (
            f"the architecture has {len(self.owned)} residual adds, the masks {len(self.masks)} branches"
        )


@contextlib.contextmanager
def constant(owners: Iterable[nn.Module | nn.Parameter]) -> Iterator[None]:
    """Within the block the owners' parameters are constants: no graph leads to them."""
    parameters = [p for p in _parameters(owners) if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    yield
    for p in parameters:
        p.requires_grad_(True)


def _parameters(owners: Iterable[nn.Module | nn.Parameter]) -> list[nn.Parameter]:
    return [p for o in owners for p in ([o] if isinstance(o, nn.Parameter) else o.parameters())]


def oracle_forward(
    model: nn.Module,
    x: Tensor,
    masks: Tensor | None,
    phase: str = "PLAIN",
    rates: Sequence[float] | None = None,
    freeze: str = "output",
    scale_by_keep: bool = False,
) -> Tensor:
    """The output of `model` in one phase under the given masks; the arguments are those of `Adds`."""
    adds = Adds(masks, phase, rates, freeze, scale_by_keep)
    out = model.oracle(x, adds)
    adds.finish()
    return out


def branches_of_parameters(model: nn.Module, x: Tensor) -> dict[str, set[int]]:
    """For every parameter the numbers of the branches it is used in; empty where it is (also) used outside of them."""
    adds = Adds(None, "PLAIN", None)
    with torch.no_grad():
        model.oracle(x, adds)
    names = {id(p): name for name, p in model.named_parameters()}
    used: dict[str, set[int]] = {name: set() for name in names.values()}
    for n, owners in enumerate(adds.owned):
        for p in _parameters(owners):
            used[names[id(p)]].add(n)
    return used


def live_parameters(used: dict[str, set[int]], masks: Tensor, phase: str, rates: Sequence[float]) -> set[str]:
    """The parameters that some row of this forward reaches with gradient.

    DROP reaches a branch's parameters through its undropped rows, FREEZE through its dropped ones; a branch of rate 0
    and everything outside of the branches is reached by every row.
    """

    def reached(n: int) -> bool:
        if phase == "PLAIN" or rates[n] == 0:
            return True
        return bool(masks[n].any() if phase == "DROP" else (~masks[n]).any())

    return {name for name, branches in used.items() if not branches or any(map(reached, branches))}


def branch_rates(blocks: Sequence[int], rate: float, decay: str) -> list[float]:
    """The drop probability of each branch: block l of L gets `rate * l / (L - 1)` under linear decay.

    Args:
        blocks: the number of the block, counted from 0 in forward order, that each branch is added in.
        rate: the drop probability of the deepest block.
        decay: `"linear"` or `"constant"`.
    """
    last = max(blocks)
    if decay == "constant" or last == 0:
        return [rate] * len(blocks)
    return [rate * block / last for block in blocks]
