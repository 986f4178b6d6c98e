"""The study's table and figure: what is compared with what, and what a partial study says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import study_arms
from hypothesis import given
from hypothesis import strategies as st
from study_run import StudyError

from tools.frontier import Study, compared, missing, read_studies
from tools.paired import half_width, holm, paired_p_value
from tools.study_report import MARKS, draw, frontier_figure, main, put, report

PLAIN = {
    "standard": (1.0, 60.0),
    "standard-0.85": (0.85, 59.0),
    "standard-0.7": (0.7, 57.0),
    "standard-0.5": (0.5, 50.0),
}
NOISE = (0.0, 2.0, -1.0, 0.5, 3.0)  # of the seeds, which all arms share


def write(root: Path, arm: str, cost: float, values: dict[int, float], setting: str = "resnet", **more: Any) -> None:
    for seed, value in values.items():
        path = root / setting / arm / f"seed-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"top1": value, "test_loss": value / 10, "flops": 1e12 * cost, "reused": 0.5} | more
        record = {"setting": setting, "arm": arm, "seed": seed, "commit": "a" * 40, "seconds": 1.0, "result": result}
        path.write_text(json.dumps(record))


def seeds(mean: float, jitter: float = 0.0, count: int = 5) -> dict[int, float]:
    return {seed: mean + NOISE[seed] + jitter * (-1) ** seed for seed in range(count)}


def only(root: Path) -> Study:
    (study,) = read_studies(root)
    return study


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for arm, (cost, mean) in PLAIN.items():
        write(tmp_path, arm, cost, seeds(mean))
    return tmp_path


def test_between_two_controls_plain_training_is_linear_on_each_seeds_own_values(root: Path) -> None:
    at = only(root).plain_at(0.6)
    assert at == pytest.approx({seed: 53.5 + noise for seed, noise in enumerate(NOISE)})
    assert only(root).plain_at(0.85)[1] == pytest.approx(61.0)


def test_beyond_the_dearest_control_it_stays_and_below_the_cheapest_there_is_nothing(root: Path) -> None:
    assert only(root).plain_at(1.3)[0] == pytest.approx(60.0)
    assert only(root).plain_at(0.4) == {}


def test_a_shorter_plain_run_that_is_better_is_the_frontier(root: Path) -> None:
    write(root, "standard-0.7", 0.7, seeds(62.0))  # over-fitting: fewer steps are better
    study = only(root)
    assert [name for _, name in study.frontier()] == ["standard-0.5", "standard-0.7"]
    write(root, "rdp-row", 1.0, seeds(61.0, 0.1))  # better than standard, and yet
    pairs = compared([only(root)])["resnet", "rdp-row"]
    assert max(pairs) < 0


def test_a_loss_is_better_if_it_is_lower(tmp_path: Path) -> None:
    for arm, (cost, mean) in PLAIN.items():
        write(tmp_path, arm, cost, seeds(100 - mean), setting="gpt")
    write(tmp_path, "rdp-row", 0.7, seeds(40.0, 0.01), setting="gpt")
    assert next(name for _, name in only(tmp_path).frontier()) == "standard-0.5"
    assert min(compared([only(tmp_path)])["gpt", "rdp-row"]) > 0
    assert "better" in report(read_studies(tmp_path))


def test_what_is_not_shown_is_called_so(root: Path) -> None:
    write(
        root,
        "rdp-row",
        0.7,
        {seed: value + jitter for (seed, value), jitter in zip(seeds(57.5).items(), (3, -2, 1, -1, 0), strict=True)},
    )
    assert "no difference shown" in report([only(root)])


def test_a_partial_study_says_what_is_missing(root: Path) -> None:
    lesions = {"table": [{"worth": 3.0}, {"worth": 1.0}]}
    write(root, "rdp-batch", 0.7, seeds(57.0, 0.1, count=2), lesions=lesions, train_top1=99.0, bn_top1=58.0)
    assert "| 99.0 | 0.50 | 2.0 |" in report([only(root)])
    lines = missing([only(root)])
    assert "resnet: rdp-batch, seeds 2 3 4 (python recipes/study.py --settings resnet --arms rdp-batch)" in lines
    assert not any(": standard," in line for line in lines)
    write(root, "droppath", 1.0, {0: 60.0}, setting="vit")  # no control of the setting yet
    text = report(read_studies(root))
    assert "| DropPath row 0.1, scaled | ? | 60.00 | 1 |" in text
    assert len(compared(read_studies(root))) == 1


def test_it_says_where_runs_were_made(root: Path) -> None:
    for seed, gpus in ((0, ["H100"]), (1, [])):
        path = root / "resnet" / "standard" / f"seed-{seed}.json"
        environment = {"gpus": gpus, "packages": {"torch": "2.9"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": environment, "recounted": {}}))
    text = report([only(root)])
    assert "H100, torch 2.9 (seeds 0); CPU, torch 2.9 (seeds 1)" in text
    assert "Cost of standard counted afterwards" in text


def test_the_figure_is_drawn_of_what_there_is(root: Path, tmp_path: Path) -> None:
    write(root, "rdp-batch", 0.7, seeds(57.0, 0.1, count=2))
    write(root, "droppath", 1.0, {0: 60.0}, setting="vit")
    files = draw(read_studies(root), tmp_path / "figures" / "frontier")
    assert [file.suffix for file in files] == [".svg", ".png"]
    assert all(file.stat().st_size > 1000 for file in files)
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in draw(read_studies(root), tmp_path / "figures" / "frontier")] == before


@pytest.mark.parametrize("count", [1, 5, 20])
def test_what_stands_for_what_has_room_below_however_many_arms_there_are(root: Path, count: int) -> None:
    names = [arm.name for arm in study_arms.arms(study_arms.SETTINGS["resnet"]) if not arm.plain and not arm.tunes]
    for name in names[:count]:
        write(root, name, 0.7, seeds(57.0, 0.1, count=3))
    figure = frontier_figure(read_studies(root))
    figure.canvas.draw()
    (axes,) = figure.axes
    legend, label = axes.get_legend().get_window_extent(), axes.xaxis.label.get_window_extent()
    assert len(axes.get_legend().get_texts()) == 1 + min(count, len(names))
    assert 0 <= legend.y0 < legend.y1 <= label.y0
    assert axes.yaxis.label.get_window_extent().x0 >= 0
    assert axes.title.get_window_extent().y1 <= figure.bbox.y1


def test_commits_are_not_mixed(root: Path) -> None:
    path = root / "resnet" / "standard" / "seed-0.json"
    path.write_text(path.read_text().replace("a" * 40, "b" * 40))
    with pytest.raises(StudyError, match="of resnet are of 2 commits"):
        read_studies(root)


def test_the_page_gets_the_table_between_its_marks(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    main(root, page=page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| standard | 1.000 | 60.90 ± 1.60 | 5 |" in text
    assert "missing: resnet: rdp-row, seeds 0 1 2 3 4" in capsys.readouterr().out
    page.write_text("no marks")
    with pytest.raises(StudyError, match="has no <!-- study -->"):
        put(page, "table")


def test_nothing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: no records below"):
        main(tmp_path)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_procedure_rejects(p_values: list[float]) -> None:
    corrected = holm(dict(enumerate(p_values)))
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for place, key in enumerate(sorted(range(len(p_values)), key=lambda key: p_values[key])):
            if p_values[key] * (len(p_values) - place) >= level:
                break
            rejected.add(key)
        assert {key for key, p in corrected.items() if p < level} == rejected


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.5, 0.99))
def test_the_interval_has_what_the_test_does_not_reject(differences: list[float], level: float) -> None:
    mean = sum(differences) / len(differences)
    width = half_width(differences, level)
    if width < 1e-6:
        return
    at_its_end = [value - mean + width for value in differences]
    assert paired_p_value(at_its_end) == pytest.approx(1 - level, abs=1e-4)
