"""Table 1 of the paper beside what was measured here: accuracy over seeds, its significance, and what it cost.

    python tools/table1.py results/
    python tools/table1.py results/ --format markdown > table1.md
    python tools/table1.py results/ --format csv

Reads every `result.json` that the recipes left below the folder. A cell is the mean +- sample standard deviation of
the final top-1 test accuracy in percent over n seeds; runs whose settings or images differ are never averaged together.
Says which runs are not finished, and what is missing of those of the paper's cells that were begun.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import project_paths  # noqa: F401
import tyro
from engine import explained
from paired import paired_p_value

COLUMNS = ("standard", "droppath row", "rdp row", "droppath batch", "rdp batch")
REQUIRED = COLUMNS[:3]  # the paper's
MODELS = ("resnet50", "resnet50d")
RECIPES = {"mnist": "mnist.py", "cifar10": "cifar10.py", "imagenet": "imagenet_ffcv.py"}
PAPER = {"imagenet": "75.5-76.6"}  # the range of the paper's ImageNet accuracies; for the rest see there
# Training and test images of the whole data sets; a run on others, as with `--limit`, is none of the paper's.
SIZES = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}
# How an algorithm is used, if not as in the paper: a cell of its own, named by what differs.
USUAL: dict[str, Any] = {
    "decay": "linear",
    "sampling": "bernoulli",
    "freeze": "output",
    "compute": "auto",
    "phases": ["drop", "freeze"],
    "start": 0.0,
    "stop": 1.0,
    "rate_schedule": "constant",
    "freeze_outside": 1.0,
}
# What distinguishes the cells of a row, and where a run happened: neither makes another row. The loader that read does.
WITHIN_A_ROW = {"algorithm", "mode", "rate", "count_steps", *USUAL}
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
HEADER = (
    "data set",
    "model",
    "settings",
    "algorithm",
    "paper",
    "top-1 %",
    "n",
    "vs standard",
    "seconds",
    "FLOPs",
    "a branch",
)


@dataclass(frozen=True)
class Run:
    """One finished seed."""

    path: Path
    result: dict[str, Any]
    settings: tuple[tuple[str, Any], ...]  # what all cells of its row share
    unusual: str = ""  # settings of the algorithm that are not the paper's

    @property
    def column(self) -> str:
        """The algorithm, with its mask mode and what is unusual."""
        algorithm = self.result["algorithm"]
        return (algorithm if algorithm == "standard" else f"{algorithm} {self.result['mode']}") + self.unusual

    @property
    def sizes(self) -> tuple[int, int] | None:
        """The number of training and test images; None in older results, which do not say it."""
        data = self.result.get("data")
        return data and (data["training"]["samples"], data["test"]["samples"])

    @property
    def data_set(self) -> str:
        """Its name, with the number of images if it is not the whole of it; `imagenet` may be any folder."""
        name = str(self.result["dataset"])
        if self.sizes is None or self.sizes == SIZES.get(name, self.sizes):
            return name
        classes = self.result["data"]["training"]["classes"]
        return (
            f"{'folder' if name == 'imagenet' else name} ({self.sizes[0]} + {self.sizes[1]} images, {classes} classes)"
        )

    @property
    def in_paper(self) -> bool:
        """Whether the paper has this cell."""
        known = self.data_set in RECIPES and self.result["model"] in MODELS
        return known and self.column in REQUIRED and not dict(self.settings).get("limit")


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
            shared["images"] = [part["listing"][:8] for part in result.get("data", {}).values()]
            other = [f", {name} {config[name]}" for name, value in USUAL.items() if config.get(name, value) != value]
            settings = tuple((name, _hashable(value)) for name, value in sorted(shared.items()))
            runs.append(Run(path, result, settings, "".join(other)))
        except (OSError, ValueError, AttributeError) as error:
            raise TableError(f"cannot read the run of {path}: {error}") from error
    if not runs:
        begun = f" ({len(unfinished(folder))} runs are not finished)" if unfinished(folder) else ""
        raise TableError(
            f"no result.json below {folder}{begun}: run a recipe first, such as python recipes/mnist.py --quick"
        )
    return runs


def unfinished(folder: Path) -> list[str]:
    """The runs below a folder that have begun and not ended, a line each."""
    lines = []
    for path in sorted(folder.rglob("config.json")):
        if not (path.parent / "result.json").exists():
            try:
                epochs = json.loads(path.read_text())["epochs"]
                done = len((path.parent / "metrics.jsonl").read_text().splitlines())
                lines.append(f"{path.parent}: {done} of {epochs} epochs")
            except (OSError, ValueError, KeyError, TypeError):
                lines.append(f"{path.parent}")
    return lines


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
    names = {name for settings in rows for name, _ in settings} - {"dataset", "model"}
    varying = {name for name in names if len({repr(dict(settings).get(name)) for settings in rows}) > 1}
    lines = []
    for settings, cells in rows.items():
        shared = dict(settings)
        named = ["equal cost" if shared["match"] == "cost" else "equal steps", f"{shared['epochs']} epochs"]
        named += [f"{name} {shared.get(name)}" for name in sorted(varying - {"match", "epochs"})]
        for column, cell in cells.items():
            one = next(iter(cell.values()))
            start = (one.data_set, shared["model"], ", ".join(named), column)
            paper = PAPER.get(shared["dataset"], "see paper") if one.in_paper else ""
            lines.append((*start, paper, *_cell(cell, cells.get("standard", {}))))
    return sorted(lines, key=lambda line: (line[:3], COLUMNS.index(line[3].partition(",")[0]), line[3]))


def missing(runs: list[Run]) -> list[str]:
    """The paper's cells that no run fills.

    Returns:
        A line for each data set and model of which there is a cell, with the command that fills the others, and one for
        those of which there is none.
    """
    filled = {(run.data_set, run.result["model"], run.column) for run in runs if run.in_paper}
    lines, untouched = [], []
    for dataset, recipe in RECIPES.items():
        for model in MODELS:
            absent = [column for column in REQUIRED if (dataset, model, column) not in filled]
            if len(absent) == len(REQUIRED):
                untouched.append(f"{dataset} {model}")
            elif absent:
                algorithms = "|".join(column.split()[0] for column in absent)
                command = f"python recipes/{recipe} --model {model} --algorithm {algorithms}"
                lines.append(f"{dataset} {model}: {', '.join(absent)} ({command})")
    return lines + ([f"all of {', '.join(untouched)}"] if untouched else [])


def _cell(cell: dict[int, Run], standard: dict[int, Run]) -> tuple[str, ...]:
    top1 = [run.result["top1"] for run in cell.values()]
    accuracy = f"{statistics.fmean(top1):.2f}" + (f" +- {statistics.stdev(top1):.2f}" if len(top1) > 1 else "")
    lesions = [run.result.get("lesions", {}).get("table", ()) for run in cell.values()]
    worth = [lesion["worth"] for table in lesions for lesion in table]
    branch = f"{statistics.fmean(worth):.2f}" if worth else ""
    return (accuracy, str(len(top1)), *_against(cell, standard), branch)


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
        "seconds, FLOPs: of the whole training, relative to standard; seconds only compare on the same machine.\n"
        "a branch: what leaving out one of them costs, mean over branches and runs with --lesions."
    )
    for run in unfinished(folder):
        print(f"not finished: {run}")
    for cell in missing(runs):
        print(f"missing of the paper's table: {cell}")


if __name__ == "__main__":
    with explained():
        tyro.cli(main, description=__doc__)
