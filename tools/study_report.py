"""The table and the figure of docs/evidence.md, of the records of recipes/study.py, also while some are missing.

    python tools/study_report.py results/study
    python tools/study_report.py results/study --figure docs/images/frontier --page docs/evidence.md

Prints the table and what is missing. `--figure` writes FIGURE.svg and FIGURE.png: metric against cost, one point an
arm, the frontier of plain training as a line. `--page` puts the table between the page's marks `<!-- study -->` and
`<!-- /study -->`. docs/evidence.md says what is compared and what counts as better.
"""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import project_paths  # noqa: F401
import tyro
from engine import explained
from frontier import Study, compared, differences, missing, read_studies
from paired import half_width, holm, paired_p_value
from study_arms import Arm
from study_run import StudyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.01
MARKS = ("<!-- study -->", "<!-- /study -->")
HEADER = ("arm", "cost", "metric", "n", "vs standard", "vs plain at this cost", "p", "Holm", "train %")
HEADER += ("reused", "a branch", "BN anew")


def verdict(pairs: list[float], corrected: float) -> str:
    """What docs/evidence.md calls it."""
    if corrected >= LEVEL:
        return "no difference shown"
    return "better" if statistics.fmean(pairs) > 0 else "worse"


def report(studies: list[Study]) -> str:
    """The tables, in Markdown."""
    pairs = compared(studies)
    p_values = {key: paired_p_value(value) for key, value in pairs.items()}
    corrected = holm(p_values)
    lines = []
    for study in studies:
        metric = "top-1 %" if study.setting.metric == "top1" else "test loss"
        lines += [f"**{study.setting.name}**: {study.setting.title}; commit {study.commit[:12]}", ""]
        lines += ["| " + " | ".join(HEADER).replace("metric", metric) + " |", "|---" * len(HEADER) + "|"]
        for arm in study.present():
            key = (study.setting.name, arm.name)
            tested = ["", "control" if arm.plain or arm.tunes else ""]
            if key in pairs:
                said = verdict(pairs[key], corrected[key])
                tested = [f"{p_values[key]:.2g}", f"{corrected[key]:.2g}: {said}"]
            against = _difference(pairs.get(key, []), study)
            cells = [arm.title, *_measured(study, arm), against, *tested, *_beside(study, arm)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *_where(study), ""]
    lines.append(
        "Means ± standard deviations over n seeds. Differences are paired by seed, positive where the arm is better (a "
        "loss: lower), ± half of the 95 % interval. p: two-sided paired t-test against the plain frontier at the arm's "
        f"cost; Holm: corrected for all {len(p_values)} of this report, level {LEVEL}. *train*: top-1 on training "
        "images at the end. *reused*: feature reuse score ([feature_reuse.md](feature_reuse.md)). *a branch*: what "
        "leaving out one costs in top-1, mean over branches, first seed ([shallower.md](shallower.md)). *BN anew*: the "
        "metric with BatchNorm's statistics taken anew, minus that without."
    )
    return "\n".join(lines)


def _where(study: Study) -> list[str]:
    """On which machines, and whether their FLOPs were counted on another."""
    seeds: dict[str, set[int]] = {}
    recounted = set()
    for arm, records in study.records.items():
        for seed, record in records.items():
            environment = record.get("environment", {})
            torch = environment.get("packages", {}).get("torch", "?")
            place = f"{' '.join(environment.get('gpus', ())) or 'CPU'}, torch {torch}"
            seeds.setdefault(place, set()).add(seed)
            if "recounted" in record:
                recounted.add(arm)
    said = "; ".join(f"{place} (seeds {' '.join(map(str, sorted(those)))})" for place, those in seeds.items())
    lines = [f"Run on {said}."]
    if recounted:
        lines.append(
            f"Cost of {', '.join(sorted(recounted))} counted afterwards, with what can run on rows on rows; see "
            "`recounted` in the records."
        )
    return lines


def _measured(study: Study, arm: Arm) -> list[str]:
    values = study.values(arm.name)
    shown = [abs(value) for value in values.values()]
    mean = f"{statistics.fmean(shown):.{_digits(study)}f}"
    if len(shown) > 1:
        mean += f" ± {statistics.stdev(shown):.{_digits(study)}f}"
    if "standard" not in study.records:
        return ["?", mean, str(len(values)), ""]
    pairs = [] if arm.name == "standard" else differences(values, study.values("standard"))
    return [f"{study.cost(arm.name):.3f}", mean, str(len(values)), _difference(pairs, study)]


def _beside(study: Study, arm: Arm) -> list[str]:
    results = [record["result"] for record in study.records[arm.name].values()]
    metric = study.setting.metric
    anew = [r["bn_" + metric.removeprefix("test_")] - r[metric] for r in results if "bn_top1" in r]
    reused = [result["reused"] for result in results if "reused" in result]
    worth = [lesion["worth"] for r in results for lesion in r.get("lesions", {}).get("table", ())]
    train = [result["train_top1"] for result in results if "train_top1" in result]
    return [
        f"{statistics.fmean(train):.1f}" if train else "",
        f"{statistics.fmean(reused):.2f}" if reused else "",
        f"{statistics.fmean(worth):.1f}" if worth else "",
        f"{statistics.fmean(anew):+.{_digits(study)}f}" if anew else "",
    ]


def _difference(pairs: list[float], study: Study) -> str:
    if not pairs:
        return ""
    spread = f" ± {half_width(pairs):.{_digits(study)}f}" if len(pairs) > 1 else " (one seed)"
    return f"{statistics.fmean(pairs):+.{_digits(study)}f}{spread}"


def _digits(study: Study) -> int:
    return 2 if study.setting.metric == "top1" else 4


def draw(studies: list[Study], path: Path) -> list[Path]:
    """Draw metric against cost; see the module.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = frontier_figure(studies)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    with matplotlib.rc_context({"svg.hashsalt": "rdp"}):  # the same records make the same files
        for file in files:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
    return files


def frontier_figure(studies: list[Study]) -> Figure:
    """Metric against cost, a chart a setting, however many arms there are. Arms of fewer seeds are hollow."""
    from matplotlib import pyplot

    names = max(1 + sum(not arm.plain for arm in study.points()) for study in studies)
    heights = (0.45, 3.4, 0.55 + 0.165 * names)  # in inches: titles, charts, and below them what stands for what
    height = sum(heights)
    figure, row = pyplot.subplots(1, len(studies), figsize=(4.6 * len(studies), height), squeeze=False, dpi=150)
    figure.subplots_adjust(
        left=0.65 / (4.6 * len(studies)),
        right=1 - 0.15 / (4.6 * len(studies)),
        top=1 - heights[0] / height,
        bottom=heights[2] / height,
        wspace=0.2,
    )
    for study, axes in zip(studies, row[0], strict=True):
        better_is_lower = study.setting.metric != "top1"
        axes.set_title(textwrap.fill(f"{study.setting.name}: {study.setting.title}", 50), fontsize=8)
        axes.set_xlabel("FLOPs of the training, standard = 1", fontsize=9)
        label = "test loss (upside down: better is higher)" if better_is_lower else "top-1 test accuracy, %"
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        if better_is_lower:
            axes.invert_yaxis()
        points = study.points()
        for number, (arm, (cost, value, spread)) in enumerate(points.items()):
            colour, marker = ("black", "o") if arm.plain else (f"C{number % 10}", "sD^v"[number % 4])
            seeds = len(study.records[arm.name])
            few = seeds < len(study.records["standard"])
            axes.errorbar(
                cost,
                value,
                spread,
                color=colour,
                fmt=marker,
                markersize=5,
                markerfacecolor="white" if few else colour,
                capsize=2,
                lw=0.5 if few else 1,
                label=None if arm.plain else arm.title + f" ({seeds} seeds)" * few,
                zorder=1 if few else 2,
            )
        places = {arm.name: point[:2] for arm, point in points.items()}
        line = [places[name] for _, name in study.frontier()]
        line += [(max(x for x, _ in places.values()), line[-1][1])] if line else []  # beyond the last it stays there
        axes.plot([x for x, _ in line], [y for _, y in line], color="black", lw=1, label="plain training")
        below = (0.5, -0.45 / heights[1])
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=below, borderaxespad=0, frameon=False)
    return figure


def put(page: Path, text: str) -> None:
    """Put a text between the marks of a page.

    Raises:
        StudyError: it has no marks.
    """
    before, first, rest = page.read_text().partition(MARKS[0])
    _, second, after = rest.partition(MARKS[1])
    if not first or not second:
        raise StudyError(f"{page} has no {' and '.join(MARKS)} to put the table between")
    page.write_text(f"{before}{first}\n{text}\n{second}{after}")


def main(folder: Annotated[Path, tyro.conf.Positional], figure: Path | None = None, page: Path | None = None) -> None:
    """Print the table, then what is missing.

    Args:
        folder: where records lie.
        figure: also draw FIGURE.svg and FIGURE.png.
        page: also put the table into this page, between its marks.
    """
    if page is not None and not page.is_file():
        raise SystemExit(f"error: {page} is no file: --page names a page that has {' and '.join(MARKS)}")
    try:
        studies = read_studies(folder)
        text, absent = report(studies), missing(studies)
        print(text)
        if page is not None:
            partial = f"\n\n{len(absent)} arms are not complete yet." if absent else ""
            put(page, text + partial)
        if figure is not None:
            print("\n".join(map(str, draw(studies, figure))))
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error
    for line in absent:
        print(f"missing: {line}")


if __name__ == "__main__":
    with explained():
        tyro.cli(main, description=__doc__)
