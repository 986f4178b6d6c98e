"""Drop rates: what is one, and those of all branches from that of the deepest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from rdp.branches import Branch
from rdp.errors import ArgumentError
from rdp.masks import Decay, branch_rates


def as_rate(rate: Any) -> float:
    """The number in what is given as a drop rate: itself, or what a tensor or array of no dimension holds.

    Raises:
        ArgumentError: If it is no drop rate.
    """
    if getattr(rate, "requires_grad", False):
        raise ArgumentError(
            "rate does not learn, and got a tensor that requires a gradient: pass its value, rate.item()"
        )
    if getattr(rate, "ndim", None) == 0:
        rate = rate.item()
    check_rate(rate)
    return rate  # type: ignore[no-any-return]


def check_rate(rate: object) -> None:
    """Refuse what is no drop rate.

    Raises:
        ArgumentError: If so.
    """
    if isinstance(rate, Optimizer):
        raise ArgumentError(
            f"rate must be a number in [0, 1); got an optimizer, {type(rate).__name__}. It is wrapped, by the handle:\n"
            "    handle = rdp.attach(model, rate=0.1)\n"
            "    optimizer = handle.wrap(optimizer)"
        )
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ArgumentError(f"rate must be a number in [0, 1), the probability of dropping; got {rate!r}")


def rates_of(branches: Sequence[Branch], rate: float, decay: Decay) -> tuple[float, ...]:
    """The rates of branches where the deepest has `rate`; those that do not train have none, and take no part."""
    idle = {b.depth for b in branches if b.idle} - {b.depth for b in branches if not b.idle}
    depths = [b.depth - sum(depth < b.depth for depth in idle) for b in branches if not b.idle]
    rates = iter(branch_rates(depths, rate, decay))
    return tuple(0.0 if b.idle else next(rates) for b in branches)
