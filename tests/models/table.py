"""The table of docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version

BEGIN, END = "<!-- coverage table: written by tools/model_coverage.py -->", "<!-- end of coverage table -->"
HEADER = (
    "family",
    "model",
    "branches",
    "sums",
    "own DropPath",
    "elsewhere",
    "last branch",
    "refused",
    "check",
    "on rows",
    "s",
)
TEXT = {"family", "model", "last branch", "refused", "check"}


@dataclass(frozen=True)
class Row:
    """What is known of one model."""

    source: str
    family: str
    model: str
    branches: int
    sums: int
    """Residual sums that the branches feed: more than branches where modules are shared."""
    own: int | None
    """Calls of the model's own DropPath modules in one forward, built with a drop path rate of 0.1; None: has none."""
    elsewhere: int
    """How many of these are on no branch of a residual sum, so that nothing passes the rows that they drop."""
    last: str
    refused: dict[str, int] = field(default_factory=dict)
    """Reason: how many sums."""
    check: str = ""
    """"exact", or what went wrong; "" where it was not run."""
    rows: int | None = None
    """Branches that can run on some of the rows, with `compute="rows"`; None where it was not tried."""
    default: int | None = None
    """Those of them that do with "auto", where a batch has enough rows."""
    seconds: float = 0.0
    """Of discovery."""


def markdown(rows: list[Row]) -> str:
    """The rows as one table for each package."""
    lines = []
    for source in dict.fromkeys(r.source for r in rows):
        chosen = [r for r in rows if r.source == source]
        branches, sums = sum(r.branches for r in chosen), sum(r.sums for r in chosen)
        tried = [r for r in chosen if r.rows is not None]
        can, default, of = (sum(getattr(r, name) or 0 for r in tried) for name in ("rows", "default", "branches"))
        lines += [
            f"### {source} {version(source)}: {branches} branches, {sums} sums in {len(chosen)} models",
            "",
            f"{can} of {of} branches of {len(tried)} models can run on rows, {default} do by default.",
            "",
            f"| {' | '.join(HEADER)} |",
            f"|{'|'.join('---' if h in TEXT else '--:' for h in HEADER)}|",
        ]
        for r in chosen:
            refused = "; ".join(f"{n}: {reason}" for reason, n in r.refused.items())
            own = "-" if r.own is None else r.own
            last = f"`{r.last}`" if r.last else ""
            cells = (
                r.family,
                r.model,
                r.branches,
                r.sums,
                own,
                r.elsewhere or "",
                last,
                refused,
                r.check,
                "" if r.rows is None else r.rows if r.rows == r.default else f"{r.rows} ({r.default})",
                f"{r.seconds:.1f}",
            )
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def parse(text: str) -> dict[str, dict[str, str]]:
    """The rows of a document that `markdown` wrote: package/model -> cells by header."""
    rows: dict[str, dict[str, str]] = {}
    source = ""
    for line in text.partition(BEGIN)[2].partition(END)[0].splitlines():
        if line.startswith("### "):
            source = line.split()[1]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] != HEADER[0]:
            rows[f"{source}/{cells[1]}"] = dict(zip(HEADER, cells, strict=True))
    return rows
