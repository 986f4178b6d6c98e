"""Runs of any recipe side by side, for `tools/figures.py compare`: what they left, by settings, and the figure.

Runs whose settings differ in nothing but the seed and where they ran are one group; a group is called by its algorithm
and by the settings in which the groups differ.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import project_paths  # noqa: F401
from engine.config import FREE_ON_RESUME
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# What does not make two runs different: where and how they ran, and what is named by the result.
NOT_COMPARED = FREE_ON_RESUME | {"algorithm", "device", "devices", "examine", "panels", "pictures", "preset", "quick"}
NOT_COMPARED |= {"usual", "whole", "count_steps"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito (2008)
MARKERS = "os^vDPX"
# Letters in a PDF stay letters (TrueType), as publishers ask for.
STYLE: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "pdf.fonttype": 42, "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 3, "lines.linewidth": 1.2}


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: Its folder.
        result: Of result.json.
        similarity: Of similarity.json; empty if there is none.
        settings: Of config.json, those that are compared.
    """

    path: Path
    result: Mapping[str, Any]
    similarity: Mapping[str, Any]
    settings: Mapping[str, str]


Groups = dict[str, list[Run]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read all finished runs in some folders and below.

    Raises:
        SystemExit: A folder holds none, or what it holds is damaged, or there is only one; in one sentence.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        found = sorted(folder.rglob("result.json"))
        if not found:
            raise SystemExit(
                f"{folder} holds no result.json of a finished run: give folders that recipes have written to and "
                "finished with this version"
                if folder.is_dir()
                else f"{folder} is no folder: give those of finished runs"
            )
        runs |= {path.parent.resolve(): _read(path.parent) for path in found}
    if len(runs) < 2:
        raise SystemExit(f"only one finished run in {', '.join(map(str, folders)) or 'no folder'}: give two or more")
    return list(runs.values())


def _read(folder: Path) -> Run:
    path = folder / "result.json"
    try:
        result = _json(path)
        for name in ("dataset", "model", "algorithm", "seed", "top1", "train_seconds", "relative_flops"):
            result[name]
        similarity = _json(path) if (path := folder / "similarity.json").exists() else {}
        # The spiral has its algorithms below one folder of settings.
        path = next(p for at in (folder, folder.parent) if (p := at / "config.json").exists())
        config = {"dataset": result["dataset"], "model": result["model"], **_json(path)}
    except StopIteration:
        raise SystemExit(f"{folder} has a result.json but no config.json: it is not as a recipe left it") from None
    except KeyError as error:
        raise SystemExit(f"{path} lacks {error}: it was written by another version, so train that run anew") from None
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} is damaged ({error}): restore it, or leave that run out") from None
    return Run(folder, result, similarity, {n: str(v) for n, v in config.items() if n not in NOT_COMPARED})


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def grouped(runs: Sequence[Run]) -> Groups:
    """Runs by the name of their group, in the order of standard, DropPath, RDP, then of settings.

    Raises:
        SystemExit: Two runs are of the same group and seed.
    """
    names = sorted({name for run in runs for name in run.settings})
    differing = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    order = ["standard", "droppath", "rdp"]
    groups: Groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.result["seed"]):
        # What differs only between algorithms says nothing besides them.
        same = [r for r in runs if r.result["algorithm"] == run.result["algorithm"]]
        told = [n for n in differing if n in ("dataset", "model") or len({r.settings.get(n) for r in same}) > 1]
        label = ", ".join([run.result["algorithm"], *(f"{n} {run.settings.get(n, '-')}" for n in told)])
        if twin := next((r for r in groups[label] if r.result["seed"] == run.result["seed"]), None):
            raise SystemExit(f"{twin.path} and {run.path} have the same settings and seed: leave one of them out")
        groups[label].append(run)
    return dict(sorted(groups.items(), key=lambda group: (order.index(group[1][0].result["algorithm"]), group[0])))


def table(groups: Groups) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    head = ("", "seeds", "test top-1, %", "without a branch", "reused", "recreated", "FLOPs of a step", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, runs in groups.items():
        lesioned = [statistics.fmean(lesion["metric"] for lesion in r["table"]) for r in lesions(runs)]
        columns = [
            spread([r.result["top1"] for r in runs], 2),
            spread(lesioned, 2),
            *(spread([r.similarity[n] for r in runs if n in r.similarity], 3) for n in ("reused", "recreated")),
            spread([r.result["relative_flops"] for r in runs], 2),
            spread([r.result["train_seconds"] for r in runs], 0),
        ]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; "-" of nothing."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def lesions(runs: Iterable[Run]) -> list[Mapping[str, Any]]:
    """What was measured without branches, of the runs in which it was."""
    return [r.result["lesions"] for r in runs if r.result.get("lesions")]


def comparison_figure(groups: Groups) -> Figure:
    """Draw similarity, lesions, accuracy and cost; lines and bars are means, bands reach from lowest to highest."""
    looks = {n: (COLORS[i % 7], MARKERS[i % 7], "-" if i < 7 else "--") for i, n in enumerate(groups)}
    alike = {n: [dict(enumerate(r.similarity["cka"])) for r in runs if r.similarity] for n, runs in groups.items()}
    cut = {n: [{int(k): v for k, v in each["least"].items()} for each in lesions(runs)] for n, runs in groups.items()}
    numbers = {
        name: {group: [r.result[name] for r in runs] for group, runs in groups.items()}
        for name in ("top1", "relative_flops")
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.2 + 0.35 * len(groups)), dpi=200, layout="constrained")
        (near, left), (right, cost) = figure.subplots(2, 2, height_ratios=[2.2, 0.5 + 0.2 * len(groups)])
        for axes, curves, needed in (near, alike, "similarity.json"), (left, cut, "a run with --lesions"):
            _lines(axes, curves, looks)
            if not any(curves.values()):
                axes.text(0.5, 0.5, f"needs {needed}", ha="center", transform=axes.transAxes)
        near.set(title="a  Similarity to the input (linear CKA)", xlabel="layer (0 is the input)")
        left.set(title="b  Accuracy without branches, %", xlabel="branches removed, those worth least first")
        _rows(right, numbers["top1"], looks)
        _rows(cost, numbers["relative_flops"], looks)
        right.set(title="c  Test accuracy, %")
        cost.set(title="d  FLOPs of a step, beside standard", xlim=(0, None))
        cost.tick_params(labelleft=False)
        lines = [near.plot([], [], color=c, marker=m, linestyle=s, label=n)[0] for n, (c, m, s) in looks.items()]
        figure.legend(handles=lines, loc="outside upper center", frameon=False, ncols=3)
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, as PNG or PDF; the same runs make the same bytes."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)


def _lines(axes: Axes, curves: Mapping[str, Sequence[Mapping[int, float | None]]], looks: Mapping[str, Any]) -> None:
    for name, runs in curves.items():
        places = [x for x in (runs[0] if runs else ()) if all(run.get(x) is not None for run in runs)]
        values = [[run[x] for run in runs] for x in places]
        if not values:
            continue
        color, marker, style = looks[name]
        every = max(len(places) // 8, 1)
        means = [statistics.fmean(each) for each in values]
        axes.plot(places, means, color=color, marker=marker, linestyle=style, markevery=every)
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _rows(axes: Axes, values: Mapping[str, Sequence[float]], looks: Mapping[str, Any]) -> None:
    for place, (name, each) in enumerate(values.items()):
        color, marker, _ = looks[name]
        axes.plot(each, [place] * len(each), marker, color=color, alpha=0.5, markeredgewidth=0)
        axes.plot([statistics.fmean(each)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
    axes.set(yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.4, -0.6))
    axes.margins(x=0.1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
