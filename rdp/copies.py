"""What becomes of hooks in a copy of the model.

Hooks live in the model, so they are copied and pickled with it. A copy must be a plain, working model that does not
drive the original's run: hooks therefore turn into a function that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def inert(*args: Any) -> None:
    """What a hook is in a copy of the model."""


def _inert() -> Callable[..., None]:
    return inert


class Hook:
    """A hook that does not outlive a copy of its model.

    Args:
        owner: Whose it is, to tell the hooks of one run from those of another.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert, ()
