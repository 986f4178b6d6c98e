"""What a residual branch is to the rest of the library: where it is masked, what it owns, how often it is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

NEVER = 1 << 30
"""As many rows as no batch has."""

Kind = Literal["identity", "parallel", "projection", "named"]


@dataclass(frozen=True)
class RowAxis:
    """Where the rows (samples) of a tensor are.

    Of the `fold` entries that a row has on `axis`, as many as `inner = fold // outer` stand side by side: entry
    `(o * rows + r) * inner + i` belongs to row r. Windows and tokens folded into the batch have `outer` 1, views put
    together by `cat([a, b])` have 2.
    """

    axis: int
    fold: int = 1
    outer: int = 1

    def outer_of(self, fold: int) -> int | None:
        """`outer` where a row has another number of entries; None if that cannot be told."""
        if self.outer == 1 or fold == self.fold:
            return self.outer
        return fold if self.outer == self.fold else None


@dataclass(frozen=True)
class Point:
    """A tensor that a hook changes: number `leaf` of those that `module` returns, with its rows along `rows`."""

    module: str
    leaf: int
    rows: RowAxis | None

    @property
    def side(self) -> str:
        """Of the module."""
        return "output"


@dataclass(frozen=True)
class GatePoint(Point):
    """A module output that a hook masks."""

    zero_only: bool = False
    """A function between here and the sum keeps zeros but does not commute with rescaling, so only 0/1 masks fit."""
    of_block: bool = False
    """The module is the whole block: undropped rows take its output, dropped ones its input."""


@dataclass(frozen=True)
class CutPoint(Point):
    """What a branch is multiplied by, from outside: in FREEZE its undropped rows send no gradient back."""

    of_input: bool = False
    """The module takes the tensor, instead of returning it."""
    elements: Tensor | None = field(default=None, repr=False, compare=False)
    """Bool, and broadcasts to the tensor: those that belong to this branch; None for all."""

    @property
    def side(self) -> str:
        """Of the module."""
        return "input" if self.of_input else "output"


@dataclass(frozen=True)
class Branch:
    """A residual branch: the F of `y = shortcut(x) + F(x)`.

    Attributes:
        name: Qualified name of the module whose output is gated.
        block: Qualified name of the module whose forward adds the branch to the shortcut; "" is the model itself.
        kind: "identity" (`x + f(x)`), "parallel" (`x + f(x) + g(x)`), "projection" (`downsample(x) + f(x)`), or
            "named" for a module that `branches=` named and whose sum was not recognised.
        parameters: Names of the parameters that reach the loss through this branch and no ungated way; one that
            several branches use is listed by each.
        sums: Number of residual sums that it feeds in one forward: above 1 where modules share their weights.
        depth: Position of its block among the model's blocks; branches of one block share a drop rate.
        rate: Drop probability, without a schedule.
        share: The same where that of the deepest branch is 1; 0 means that the branch is not gated at all.
        compute: "dense" runs all rows; "rows" runs only the rows that the step needs.
        fewest: Of a branch that can run on rows, the fewest rows of a batch with which it does, since with fewer there
            would be too little to gain; 0 if there is no such number.
        gates: The module outputs that are masked; several where a branch ends in a concatenation.
        cuts: Where else FREEZE stops gradients: what is not made from x but multiplied into the branch.
        idle: Why it does not train, "in eval mode" or "without gradients", if so when it was found; its rate is
            0 then, and it takes no part in the rates of the others.
        inside: Indices of the nearest branches around this one, through which alone it reaches the output; mostly none.
            It learns from the rows that one of them lets through.
        note: What a reader of the table should know, such as "ambiguous".
    """

    name: str
    block: str
    kind: Kind
    parameters: tuple[str, ...]
    sums: int = 1
    depth: int = 0
    rate: float = 0.0
    compute: str = "dense"
    gates: tuple[GatePoint, ...] = ()
    cuts: tuple[CutPoint, ...] = ()
    inside: tuple[int, ...] = ()
    idle: str = ""
    note: str = ""
    share: float = 0.0
    fewest: int = 0

    @property
    def gated(self) -> bool:
        """Can it be dropped, if only at another rate of the handle?"""
        return self.rate > 0 or self.share > 0

    def sized(self, rows: int) -> Branch:
        """The branch, as it runs in a batch of so many rows."""
        if not self.fewest:
            return self
        small = "dense: too small to gain" + (f" with fewer than {self.fewest} rows" if self.fewest < NEVER else "")
        note = self.note.removesuffix(small).removesuffix(", ")
        if rows >= self.fewest:
            return replace(self, compute="rows", note=note)
        return replace(self, compute="dense", note=", ".join(filter(None, (note, small))))


@dataclass(frozen=True)
class Refusal:
    """A residual sum that was recognised, but whose branch cannot be gated soundly."""

    name: str
    """Qualified name of the module that ends the branch; "" where no module does."""
    block: str
    reason: str

    def __str__(self) -> str:
        where = self.name or self.block
        return f"{f'`{where}`' if where else 'a sum in the forward of the model itself'}: {self.reason}"


def branch_table(branches: tuple[Branch, ...], refused: tuple[Refusal, ...], now: Sequence[float] | None = None) -> str:
    """The branches as text, a line each, and what was refused below them; `now` are their rates, if these change."""
    header = ("branch", *(("rate",) if now is None else ("now", "peak")), "kind", "compute", "parameters", "note")
    plain = "rate 0: trained plainly in all phases"
    reasons = [f"not gated: {b.idle}" if b.idle else plain * (b.rate == 0) for b in branches]
    notes = ["; ".join(filter(None, (b.note, reason))) for b, reason in zip(branches, reasons, strict=True)]
    cells = zip(branches, notes, strict=True)
    rates = [[f"{rate:.3f}"] for rate in now] if now is not None else [[]] * len(branches)
    rows = [
        (b.name, *rate, f"{b.rate:.3f}", b.kind, b.compute, str(len(b.parameters)), note)
        for (b, note), rate in zip(cells, rates, strict=True)
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines += [f"not gated: {refusal}" for refusal in refused]
    return "\n".join(line.rstrip() for line in lines)
