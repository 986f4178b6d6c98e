"""How the ranks come to one view of which branches are live: once a step, or once a forward under `Join`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rdp.distributed.ranks import Question, Ranks
from rdp.errors import RankError


class Agreement:
    """What the ranks ask each other about the current step.

    Under `torch.distributed.algorithms.join.Join` a rank that is out of data is told of every forward of the others,
    but not of their steps. There the ranks ask at every forward, without waiting, and collect the answers at the step.

    Args:
        ranks: The processes.
        facts: Returns what must be the same on all of them, by name.
    """

    def __init__(self, ranks: Ranks, facts: Callable[[], Mapping[str, object]]) -> None:
        self.ranks = ranks
        self.join_config: Any = None
        """What `Join` has told the handle; None outside of it."""
        self._facts = facts

    def forward_begins(self, live: Tensor) -> Question | None:
        """Ask, if the handle is in a `Join` context; the question belongs to the forward.

        Raises:
            RankError: If it is the first there, and so would have to speak up before the model does.
        """
        if self.join_config is None or not self.join_config.enable:
            return None
        if self.join_config.is_first_joinable:
            raise RankError("the handle is first in Join([...]); list the model first: Join([ddp_model, handle])")
        return self.ranks.ask(live, self._facts())

    def settle(self, live: Tensor, asked: Sequence[Question]) -> Tensor:
        """All ranks are about to step; the branches that are live on any of them, bool `Tensor[branches]`.

        Args:
            live: As far as this rank knows, bool `Tensor[branches]`.
            asked: The questions of the forwards of this step, if there were any.

        Raises:
            RankError: If they do not agree on what must be the same.
        """
        questions = asked or [self.ranks.ask(live, self._facts())]
        return torch.stack([question.answer() for question in questions]).any(0)

    def shadow(self) -> None:
        """Answer a forward of the other ranks, having no data."""
        self.ranks.ask(None, self._facts()).answer()


class ShadowHook:
    """A `torch.distributed.algorithms.join.JoinHook`.

    Args:
        agreement: To be kept with ranks that still have data.
        step_count: Returns the number of steps that this rank has ended.
        skip_to: Goes to a later step, which others have reached.
    """

    def __init__(self, agreement: Agreement, step_count: Callable[[], int], skip_to: Callable[[int], None]) -> None:
        self._agreement = agreement
        self._step_count = step_count
        self._skip_to = skip_to

    def main_hook(self) -> None:
        """Called for each forward of the others."""
        self._agreement.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Called when all ranks are out of data: those that were so first catch up."""
        self._skip_to(self._agreement.ranks.highest(self._step_count()))
