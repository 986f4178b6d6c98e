"""The table of docs/models.md: what discovery finds in each model of the zoo, and whether gating it is sound.

    python tools/model_coverage.py --discover-only  # on the meta device, a few minutes
    python tools/model_coverage.py --write docs/models.md  # with the semantic check, ten minutes
    python tools/model_coverage.py --only swin vit --discover-only

Results are appended to `--results` one by one; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn
from tqdm import tqdm

from rdp.discovery import forwards
from rdp.discovery.find import Discovery, find_branches
from rdp.discovery.graph import Graph
from rdp.discovery.residuals import find_residuals
from rdp.discovery.trace import Trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.semantics import check_gating
from tools.zoo import zoo
from tools.zoo_entry import Entry

BEGIN, END = "<!-- coverage table: written by tools/model_coverage.py -->", "<!-- end of coverage table -->"
HEADER = ("family", "model", "branches", "sums", "own DropPath", "elsewhere", "last branch", "refused", "check", "s")
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
    seconds: float = 0.0
    """Of discovery."""


def discover(entry: Entry) -> Discovery:
    """Find the branches of a model of the zoo; on `meta` where the model can run there."""
    torch.manual_seed(0)
    with torch.device("meta" if entry.on_meta else "cpu"):
        return find_branches(entry.build(), (), entry.inputs(2))


def own_drop_paths(entry: Entry) -> tuple[int, int] | None:
    """Where the model drops paths by itself, and where of these discovery does not.

    Returns:
        The number of calls of active DropPath modules in a forward of the model built with a drop path rate of 0.1,
        and how many of these are on no residual branch; None if it has no DropPath.
    """
    torch.manual_seed(0)
    with torch.device("meta" if entry.on_meta else "cpu"):
        try:
            model = entry.build(drop_path_rate=0.1)
        except (TypeError, ValueError):
            return None
        inputs = entry.inputs(2)
    drops = {name for name, module in model.named_modules() if _drops_paths(module)}
    with forwards.undisturbed(model):
        graph = Graph(Trace(model).run((), inputs))
    residuals, _ = find_residuals(graph)
    inside = set().union(*(graph.between(r.fork, r.branch) for r in residuals))
    calls = [call for call in graph.trace.calls if call.name in drops]
    return len(calls), sum(not inside & set(call.outputs) for call in calls)


def _drops_paths(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    active = getattr(module, "drop_prob", 0) or getattr(module, "p", 0)
    return bool(active) and ("droppath" in kind or "stochasticdepth" in kind)


def row(entry: Entry) -> Row:
    """What discovery finds in one model."""
    begin = time.perf_counter()
    found = discover(entry)
    seconds = time.perf_counter() - begin
    own = own_drop_paths(entry)
    refused: dict[str, int] = {}
    for refusal in found.refused:
        reason = _anonymous(refusal.reason)
        refused[reason] = refused.get(reason, 0) + 1
    return Row(
        entry.source,
        entry.family,
        entry.name,
        branches=len(found.branches),
        sums=sum(b.sums for b in found.branches),
        own=None if own is None else own[0],
        elsewhere=0 if own is None else own[1],
        last=found.branches[-1].name if found.branches else "",
        refused=refused,
        seconds=round(seconds, 2),
    )


def verdict(entry: Entry) -> str:
    """Whether gating the model is exact, or what is wrong."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            problems = check_gating(*entry.build_quick())
        except Exception as error:
            problems = [f"{type(error).__name__}: {error}"]
    return "; ".join(problems) or "exact"


def _anonymous(reason: str) -> str:
    """A reason without the names of modules, so that equal ones can be counted."""
    return re.sub(r"`[^`]*`|\['.*?'\]", "...", reason)


def markdown(rows: list[Row]) -> str:
    """The rows as one table for each package."""
    lines = []
    for source in dict.fromkeys(r.source for r in rows):
        chosen = [r for r in rows if r.source == source]
        branches, sums = sum(r.branches for r in chosen), sum(r.sums for r in chosen)
        lines += [
            f"### {source} {version(source)}: {branches} branches, {sums} sums in {len(chosen)} models",
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


def _read(results: Path) -> dict[str, Row]:
    """Finished rows; a last line that was cut off is dropped."""
    rows = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            finished = Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        rows[f"{finished.source}/{finished.model}"] = finished
    return rows


def _split(document: Path) -> tuple[str, str]:
    """What stands before and after the table."""
    text = document.read_text() if document.is_file() else ""
    if BEGIN not in text or END not in text:
        sys.exit(f"{document} has no place for the table: it needs the lines {BEGIN!r} and {END!r}")
    return text.partition(BEGIN)[0], text.partition(END)[2]


def main(
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FAMILY")] = (),
    discover_only: bool = False,
    results: Path = Path("coverage.jsonl"),
    write: Path | None = None,
) -> None:
    """Run discovery, and the semantic check, on every model of the zoo.

    Args:
        only: Families, packages or models to which to confine the run.
        discover_only: Leave the semantic check out.
        results: Where finished rows are kept; delete it to start anew.
        write: Replace the table in this document; by default it is printed.
    """
    if write is not None:
        if only:
            sys.exit(f"--only is a part of the table, and --write would put it in place of the whole in {write}")
        _split(write)  # ten minutes are too late to learn that it has no place
    torch.set_num_threads(1)
    entries = [e for e in zoo() if not only or {e.family, e.source, e.name} & set(only)]
    if unknown := set(only) - {name for e in entries for name in (e.family, e.source, e.name)}:
        sys.exit(f"no family, package or model is called {', '.join(sorted(unknown))}; see tools/zoo.py")
    done = _read(results)
    with results.open("a") as stream:
        for entry in (bar := tqdm(entries, disable=None)):
            bar.set_postfix_str(entry.key)
            known = done.get(entry.key)
            finished = known or row(entry)
            if not discover_only and entry.check and finished.branches and not finished.check:
                finished = replace(finished, check=verdict(entry))
            if finished != known:
                done[entry.key] = finished
                stream.write(json.dumps(asdict(finished)) + "\n")
                stream.flush()
    table = markdown([done[entry.key] for entry in entries])
    if write is None:
        print(table)
        return
    before, after = _split(write)
    write.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    tyro.cli(main)
