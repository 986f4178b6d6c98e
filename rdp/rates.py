"""Drop rates: what is one, and those of all branches from that of the deepest."""

from __future__ import annotations

from collections.abc import Sequence

from rdp.branches import Branch
from rdp.errors import ArgumentError
from rdp.masks import Decay, branch_rates


def check_rate(rate: object) -> None:
    """Refuse what is no drop rate.

    Raises:
        ArgumentError: If so.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ArgumentError(f"rate must be a number in [0, 1), the probability of dropping; got {rate!r}")


def rates_of(branches: Sequence[Branch], rate: float, decay: Decay) -> tuple[float, ...]:
    """The rates of branches where the deepest has `rate`; those that do not train have none, and take no part."""
    idle = {b.depth for b in branches if b.idle} - {b.depth for b in branches if not b.idle}
    depths = [b.depth - sum(depth < b.depth for depth in idle) for b in branches if not b.idle]
    rates = iter(branch_rates(depths, rate, decay))
    return tuple(0.0 if b.idle else next(rates) for b in branches)
