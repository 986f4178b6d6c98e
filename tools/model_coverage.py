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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible
from engine.command import later


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
        sys.exit(f"no family, package or model is called {', '.join(sorted(unknown))}; see tests/models/zoo.py")
    done = _read(results)
    with results.open("a") as stream:
        for entry in (bar := tqdm(entries)):
            bar.set_postfix_str(entry.key)
            known = done.get(entry.key)
            finished = known or row(entry)
            if not discover_only and entry.check and finished.branches and not finished.check:
                finished = replace(finished, check=verdict(entry))
            if not discover_only and entry.check and finished.branches and finished.rows is None:
                rows, default = on_rows(entry)
                finished = replace(finished, rows=rows, default=default)
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
    with interruptible():  # and before the imports below, which take seconds
        run = tyro.cli(later(main), description=__doc__)

with interruptible():
    import torch
    from engine.progress import tqdm
    from models.found import find
    from models.semantics import check_gating
    from models.table import BEGIN, END, Row, markdown
    from models.zoo import zoo
    from models.zoo_entry import Entry, drops_paths

    from rdp.discovery import forwards
    from rdp.discovery.graph import Graph
    from rdp.discovery.residuals import find_residuals
    from rdp.discovery.trace import Trace


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
    drops = {name for name, module in model.named_modules() if drops_paths(module)}
    with forwards.undisturbed(model):
        graph = Graph(Trace(model).run((), inputs))
    residuals, _ = find_residuals(graph)
    inside = set().union(*(graph.between(r.fork, r.branch) for r in residuals))
    calls = [call for call in graph.trace.calls if call.name in drops]
    return len(calls), sum(not inside & set(call.outputs) for call in calls)


def row(entry: Entry) -> Row:
    """What discovery finds in one model."""
    begin = time.perf_counter()
    found = entry.find()
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


def on_rows(entry: Entry) -> tuple[int, int]:
    """How many branches can run on rows, and how many do by default, where a batch has enough rows."""
    counts = []
    for compute in ("rows", "auto"):
        torch.manual_seed(0)
        model, inputs = entry.build_quick()
        found = find(model.train(), inputs, compute=compute, verify=False).branches
        counts.append(sum(branch.compute == "rows" or "too small" in branch.note for branch in found))
    return counts[0], counts[1]


def _anonymous(reason: str) -> str:
    """A reason without the names of modules, so that equal ones can be counted."""
    return re.sub(r"`[^`]*`|\['.*?'\]", "...", reason)


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


if __name__ == "__main__":
    with explained():
        run()
