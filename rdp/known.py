"""What is known of branches besides what a look at forwards shows: what proving them has brought up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from rdp.proof import Proof


@dataclass
class Known:
    """What a next look at the model has to go by.

    Attributes:
        dense: By name, branches that are not to run on some of the rows, and why.
        unsound: By name, branches that are not to be gated unless the user has named them, and why.
        idle: Names of branches that run without gradients in training.
    """

    dense: dict[str, str] = field(default_factory=dict)
    unsound: dict[str, str] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)

    def learn(self, proof: Proof, on_rows: Collection[str]) -> bool:
        """Take in what a proof has shown; is any of it new?

        Args:
            proof: Of the branches that were chosen by what was known.
            on_rows: Names of those that could run on some of the rows: dense, they may be sound.
        """
        wrong = {name: why for name, why in proof.violations.items() if name not in self.unsound}
        new = bool(wrong) or not self.idle.issuperset(proof.idle)
        self.idle.update(proof.idle)
        for name, why in wrong.items():
            (self.dense if name in on_rows else self.unsound)[name] = why
        return new
