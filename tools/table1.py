"""Table 1 of the paper beside what was measured here: accuracy over seeds, its significance, and what it cost.

    python tools/table1.py results/
    python tools/table1.py results/ --format markdown > table1.md
    python tools/table1.py results/ --format csv

Reads every `result.json` that the recipes left below the folder. A cell is the mean +- sample standard deviation of
the final top-1 test accuracy in percent over n seeds; runs whose settings differ are never averaged together.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from paired import paired_p_value

COLUMNS = ("standard", "droppath row", "rdp row", "droppath batch", "rdp batch")
REQUIRED = COLUMNS[:3]  # the paper's
MODELS = ("resnet50", "resnet50d")
RECIPES = {"mnist": "mnist.py", "cifar10": "cifar10.py", "imagenet": "imagenet_ffcv.py"}
PAPER = {"imagenet": "75.5-76.6"}  # the range of the paper's ImageNet accuracies; for the rest see there
# What distinguishes the cells of a row, and where a run happened: neither makes another row. The loader that read does.
WITHIN_A_ROW = {"algorithm", "mode", "rate"}
PLACE = {
    "resume",
    "seeds",
    "seed",
    "out",
    "data_dir",
    "download",
    "loader",
    "workers",
    "checkpoint_minutes",
    "progress",
    "lesions",
}
NEEDED = {"dataset", "model", "algorithm", "mode", "rate", "seed", "top1", "steps", "train_seconds", "relative_flops"}
HEADER = ("data set", "model", "settings", "algorithm", "paper", "top-1 %", "n", "vs standard", "seconds", "FLOPs")


@dataclass(frozen=True)
class Run:
    """One finished seed."""

    path: Path
    result: dict[str, Any]
    settings: tuple[tuple[str, Any], ...]  # what all cells of its row share

    @property
    def column(self) -> str:
        """The algorithm, with its mask mode."""
        algorithm = self.result["algorithm"]
        return algorithm if algorithm == "standard" else f"{algorithm} {self.result['mode']}"


class TableError(RuntimeError):
    """The results cannot be made into a table; the message says which file and why."""


def read_runs(folder: Path) -> list[Run]:
    """Read the finished runs below a folder.

    Raises:
        TableError: there are none, or a file is damaged.
    """
    runs = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            config = json.loads((path.parent / "config.json").read_text())
            if absent := NEEDED - result.keys():
                raise ValueError(f"it lacks {', '.join(sorted(absent))}")
            shared = {k: v for k, v in config.items() if k not in WITHIN_A_ROW | PLACE}
            shared["loader"] = result.get("loader", config.get("loader"))  # older results do not say which one it was
            runs.append(Run(path, result, tuple(sorted(shared.items()))))
        except (OSError, ValueError, AttributeError) as error:
            raise TableError(f"cannot read the run of {path}: {error}") from error
    if not runs:
        raise TableError(f"no result.json below {folder}: run a recipe first, such as python recipes/mnist.py --quick")
    return runs


def table(runs: list[Run]) -> list[tuple[str, ...]]:
    """Arrange runs into the lines of the table.

    Args:
        runs: in any order.

    Returns:
        Lines of as many strings as `HEADER`, sorted by data set, model, settings and algorithm.

    Raises:
        TableError: two runs are of the same cell and seed.
    """
    rows: dict[tuple[tuple[str, Any], ...], dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    rates: dict[tuple[object, str], float] = {}
    for run in runs:
        cell = rows[run.settings][run.column]
        rate = rates.setdefault((run.settings, run.column), run.result["rate"])
        seed = run.result["seed"]
        if rate != run.result["rate"] or seed in cell:
            other = cell.get(seed) or next(iter(cell.values()))
            raise TableError(
                f"{run.path} and {other.path} are of the same cell ({run.column}, rates {run.result['rate']} and "
                f"{rate}, seeds {seed} and {other.result['seed']}): keep one of them below the folder"
            )
        cell[seed] = run
    varying = {name for name in {n for s in rows for n, _ in s} if len({repr(dict(s).get(name)) for s in rows}) > 1} - {
        "dataset",
        "model",
    }
    lines = []
    for settings, cells in rows.items():
        shared = dict(settings)
        named = ["equal cost" if shared["match"] == "cost" else "equal steps", f"{shared['epochs']} epochs"]
        named += [f"{name} {shared.get(name)}" for name in sorted(varying - {"match", "epochs"})]
        for column in COLUMNS:
            if column in cells:
                start = (shared["dataset"], shared["model"], ", ".join(named), column)
                in_paper = column in REQUIRED and shared["dataset"] in RECIPES and shared["model"] in MODELS
                paper = PAPER.get(shared["dataset"], "see paper") if in_paper else ""
                lines.append((*start, paper, *_cell(cells[column], cells.get("standard", {}))))
    return sorted(lines, key=lambda line: (line[:3], COLUMNS.index(line[3])))


def missing(runs: list[Run]) -> list[str]:
    """The paper's cells that no run fills, a line for each data set and model, with the command that fills them."""
    filled = {(run.result["dataset"], run.result["model"], run.column) for run in runs}
    lines = []
    for dataset, recipe in RECIPES.items():
        for model in MODELS:
            absent = [column for column in REQUIRED if (dataset, model, column) not in filled]
            if absent:
                algorithms = "|".join(column.split()[0] for column in absent)
                command = f"python recipes/{recipe} --model {model} --algorithm {algorithms}"
                lines.append(f"{dataset} {model}: {', '.join(absent)} ({command})")
    return lines


def _cell(cell: dict[int, Run], standard: dict[int, Run]) -> tuple[str, ...]:
    top1 = [run.result["top1"] for run in cell.values()]
    accuracy = f"{statistics.fmean(top1):.2f}" + (f" +- {statistics.stdev(top1):.2f}" if len(top1) > 1 else "")
    return (accuracy, str(len(top1)), *_against(cell, standard))


def _against(cell: dict[int, Run], standard: dict[int, Run]) -> tuple[str, str, str]:
    flops = statistics.fmean(r.result["relative_flops"] * r.result["steps"] for r in cell.values())
    paired = sorted(cell.keys() & standard.keys())
    if not paired:
        return "no standard run", "", ""
    flops /= statistics.fmean(standard[s].result["steps"] for s in paired)
    seconds = [cell[s].result["train_seconds"] / standard[s].result["train_seconds"] for s in paired]
    cost = (f"x{statistics.fmean(seconds):.2f}", f"x{flops:.2f}")
    if cell is standard:
        return "", *cost
    differences = [cell[s].result["top1"] - standard[s].result["top1"] for s in paired]
    against = f"{statistics.fmean(differences):+.2f}"
    against += f" (p={paired_p_value(differences):.3f})" if len(paired) > 1 else " (one seed)"
    return against, *cost


def render(lines: list[tuple[str, ...]], style: Literal["text", "markdown", "csv"]) -> str:
    """Write the table as aligned text, Markdown or CSV."""
    everything = [HEADER, *lines]
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer).writerows(everything)
        return buffer.getvalue().rstrip()
    if style == "markdown":
        marked = ["| " + " | ".join(line).replace("+-", "±") + " |" for line in everything]
        return "\n".join([marked[0], "|" + " --- |" * len(HEADER), *marked[1:]])
    widths = [max(len(line[i]) for line in everything) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in everything
    )


def main(folder: Annotated[Path, tyro.conf.Positional], format: Literal["text", "markdown", "csv"] = "text") -> None:
    """Print the table, then what is missing from the paper's.

    Args:
        folder: where results lie, at any depth.
        format: how to print the table.
    """
    try:
        runs = read_runs(folder)
        print(render(table(runs), format))
    except TableError as error:
        raise SystemExit(f"error: {error}") from error
    if format == "csv":
        return
    print(
        "\nvs standard: difference of the means over common seeds, with the p-value of the two-sided paired t-test.\n"
        "seconds, FLOPs: of the whole training, relative to standard; seconds only compare on the same machine."
    )
    for cell in missing(runs):
        print(f"missing: {cell}")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
