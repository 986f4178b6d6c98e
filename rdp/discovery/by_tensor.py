"""A dictionary by the identity of tensors that keeps none of them.

`torch.utils.weak` has one for all needs, which costs a trace of small layers a tenth of its time.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

V = TypeVar("V")


class ByTensor(Generic[V]):
    """What is known of tensors, for as long as each lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], V]] = {}

    def get(self, tensor: Tensor) -> V | None:
        """What is known of it; None if nothing is."""
        known = self._known.get(id(tensor))
        # What was at this address before may be gone.
        return known[1] if known is not None and known[0]() is tensor else None

    def __setitem__(self, tensor: Tensor, value: V) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), value
