from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Config
from engine.config import FREE_ON_RESUME
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import StudentT

from tools.paired import paired_p_value
from tools.table1 import HEADER, PLACE, USUAL, TableError, missing, read_runs, render, table, unfinished

SCRIPT = Path(__file__).parents[3] / "tools" / "table1.py"


def write(root: Path, seed: int, top1: float, seconds: float = 10.0, flops: float = 1.0, **settings: Any) -> Path:
    config = Config(**({"dataset": "cifar10", "algorithm": "standard"} | settings))
    folder = root / config.label / f"{config.dataset}-{config.model}-{config.epochs}" / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    names = ("dataset", "model", "algorithm", "mode", "rate", "match")
    result = {name: getattr(config, name) for name in names}
    result |= {"seed": seed, "top1": top1, "steps": 100, "train_seconds": seconds, "relative_flops": flops}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def cells(root: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The table's lines by settings and algorithm."""
    lines = (dict(zip(HEADER, line, strict=True)) for line in table(read_runs(root)))
    return {(line["settings"], line["algorithm"]): line for line in lines}


def test_a_cell_is_mean_deviation_count_difference_and_cost(tmp_path: Path) -> None:
    for seed, (standard, ours) in enumerate([(90.0, 91.0), (92.0, 94.0), (94.0, 97.0)]):
        write(tmp_path, seed, standard)
        write(tmp_path, seed, ours, seconds=8.0, flops=0.65, algorithm="rdp", mode="batch")
    found = cells(tmp_path)
    standard = found["equal steps, 300 epochs", "standard"]
    assert (standard["top-1 %"], standard["n"], standard["paper"]) == ("92.00 +- 2.00", "3", "see paper")
    ours = found["equal steps, 300 epochs", "rdp batch"]
    assert (ours["top-1 %"], ours["vs standard"]) == ("94.00 +- 3.00", "+2.00 (p=0.074)")
    assert (ours["seconds"], ours["FLOPs"]) == ("x0.80", "x0.65")


def test_only_the_papers_cells_have_the_papers_numbers(tmp_path: Path) -> None:
    write(tmp_path, 0, 70.0, dataset="imagenet")
    write(tmp_path, 0, 70.0, dataset="imagenet", algorithm="rdp", mode="batch")
    write(tmp_path, 0, 70.0, dataset="mnist10k")
    assert [line[4] for line in table(read_runs(tmp_path))] == ["75.5-76.6", "", ""]


def test_runs_with_other_settings_are_never_averaged(tmp_path: Path) -> None:
    write(tmp_path, 0, 80.0, epochs=10)
    write(tmp_path, 0, 90.0, epochs=20)
    write(tmp_path, 0, 85.0, epochs=10, algorithm="rdp", match="cost")
    found = cells(tmp_path)
    assert {settings for settings, _ in found} == {
        "equal steps, 10 epochs",
        "equal steps, 20 epochs",
        "equal cost, 10 epochs",
    }
    assert found["equal cost, 10 epochs", "rdp row"]["vs standard"] == "no standard run"


def test_only_common_seeds_are_compared(tmp_path: Path) -> None:
    for seed, top1 in enumerate([90.0, 91.0, 50.0]):
        write(tmp_path, seed, top1)
    for seed, top1 in enumerate([91.0, 92.0]):
        write(tmp_path, seed, top1, algorithm="droppath")
    assert cells(tmp_path)["equal steps, 300 epochs", "droppath row"]["vs standard"] == "+1.00 (p=0.000)"


def test_a_cell_with_two_rates_or_twice_the_same_seed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, 90.0, algorithm="rdp", rate=0.1)
    write(tmp_path / "b", 1, 90.0, algorithm="rdp", rate=0.2)
    with pytest.raises(TableError, match=r"are of the same cell \(rdp row, rates 0.2 and 0.1, seeds 1 and 0\)"):
        table(read_runs(tmp_path))
    write(tmp_path / "c" / "x", 0, 90.0)
    write(tmp_path / "c" / "y", 0, 90.0)
    with pytest.raises(TableError, match=r"are of the same cell \(standard, .* seeds 0 and 0\)"):
        table(read_runs(tmp_path / "c"))


def test_missing_cells_of_what_was_begun_come_with_the_command_that_fills_them(tmp_path: Path) -> None:
    write(tmp_path, 0, 90.0)
    write(tmp_path, 0, 90.0, algorithm="rdp")
    assert missing(read_runs(tmp_path)) == [
        "cifar10 resnet50: droppath row (python recipes/cifar10.py --model resnet50 --algorithm droppath)",
        "all of mnist resnet50, mnist resnet50d, cifar10 resnet50d, imagenet resnet50, imagenet resnet50d",
    ]


def put(result: Path, **content: object) -> None:
    path = result / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def data(training: int, test: int, classes: int = 10, listing: str = "0123456789") -> dict[str, object]:
    sizes = {"training": training, "test": test}
    return {n: {"samples": samples, "classes": classes, "listing": listing} for n, samples in sizes.items()}


@pytest.mark.parametrize(
    ("dataset", "sizes", "name", "paper"),
    [
        ("cifar10", (50_000, 10_000), "cifar10", "see paper"),
        ("cifar10", (5_000, 10_000), "cifar10 (5000 + 10000 images, 10 classes)", ""),
        ("imagenet", (1_281_167, 50_000), "imagenet", "75.5-76.6"),
        ("imagenet", (50_000, 10_000), "folder (50000 + 10000 images, 10 classes)", ""),
    ],
)
def test_a_part_of_a_data_set_or_another_folder_is_none_of_the_papers(
    dataset: str, sizes: tuple[int, int], name: str, paper: str, tmp_path: Path
) -> None:
    put(write(tmp_path, 0, 70.0, dataset=dataset), data=data(*sizes))
    (line,) = table(read_runs(tmp_path))
    assert (line[0], line[4]) == (name, paper)
    assert any(text.startswith(f"{dataset} resnet50: ") for text in missing(read_runs(tmp_path))) == bool(paper)


def test_other_images_of_the_same_name_make_another_row(tmp_path: Path) -> None:
    for seed, listing in enumerate(["original", "throughjpeg"]):
        put(write(tmp_path, seed, 90.0), data=data(50_000, 10_000, listing=listing))
    assert [line[6] for line in table(read_runs(tmp_path))] == ["1", "1"]


def test_another_use_of_the_algorithm_is_a_cell_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, 0, 90.0)
    write(tmp_path, 0, 91.0, algorithm="rdp")
    write(tmp_path / "late", 0, 92.0, algorithm="rdp", start=0.5)
    write(tmp_path / "two", 0, 93.0, algorithm="rdp", phases=("drop", "drop", "freeze"), count_steps=64)
    lines = table(read_runs(tmp_path))
    named = "rdp row, phases ['drop', 'drop', 'freeze']"
    assert [line[3] for line in lines] == ["standard", "rdp row", named, "rdp row, start 0.5"]
    assert [line[7] for line in lines] == ["", "+1.00 (one seed)", "+3.00 (one seed)", "+2.00 (one seed)"]
    assert [line[4] for line in lines] == ["see paper", "see paper", "", ""]


def test_what_is_not_finished_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, 0, 90.0)
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    assert unfinished(tmp_path) == [f"{folder}: 2 of 300 epochs"]
    with pytest.raises(TableError, match=r"no result.json below .* \(1 runs are not finished\)"):
        read_runs(tmp_path)


def test_what_is_usual_is_what_the_recipes_do() -> None:
    assert {name: Config().to_json()[name] for name in USUAL} == USUAL


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_the_p_value_is_the_tail_of_students_t(differences: list[float]) -> None:
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    if variance < 1e-6:
        return
    t = abs(mean) / (variance / n) ** 0.5
    # The tail, by the trapezoid rule on x = t + tan(angle).
    angle = torch.linspace(0, torch.pi / 2, 20_001, dtype=torch.float64)[:-1]
    density = StudentT(torch.tensor(float(n - 1), dtype=torch.float64)).log_prob(t + torch.tan(angle)).exp()
    tail = torch.trapezoid(density / torch.cos(angle) ** 2, angle)
    assert paired_p_value(differences) == pytest.approx(2 * float(tail), abs=1e-3)


@pytest.mark.parametrize(("differences", "p"), [([1.0, 1.0, 1.0], 0.0), ([0.0, 0.0], 1.0)])
def test_without_spread_the_p_value_is_certain(differences: list[float], p: float) -> None:
    assert paired_p_value(differences) == p


def test_text_markdown_and_csv_say_the_same(tmp_path: Path) -> None:
    write(tmp_path, 0, 90.0)
    write(tmp_path, 1, 91.0)
    lines = table(read_runs(tmp_path))
    assert list(csv.reader(render(lines, "csv").splitlines())) == [list(HEADER), *map(list, lines)]
    markdown = render(lines, "markdown").splitlines()
    assert [cell.strip() for cell in markdown[2].strip("|").split("|")] == [c.replace("+-", "±") for c in lines[0]]
    assert all(cell in render(lines, "text").splitlines()[1] for cell in lines[0])


def test_the_command_prints_the_table_and_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, 0, 91.26)
    shown = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=True)
    assert "91.26" in shown.stdout
    assert "missing of the paper's table: cifar10 resnet50: droppath row, rdp row" in shown.stdout


def test_no_results_and_damaged_results_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=f"no result.json below {tmp_path}: run a recipe first"):
        read_runs(tmp_path)
    (write(tmp_path, 0, 90.0) / "config.json").write_text("{")
    with pytest.raises(TableError, match=r"cannot read the run of .*result\.json"):
        read_runs(tmp_path)


@pytest.mark.parametrize(("content", "why"), [('{"top1": 90.0}', "it lacks algorithm, dataset, "), ("[1]", "list")])
def test_a_result_of_something_else_is_named(content: str, why: str, tmp_path: Path) -> None:
    (write(tmp_path, 0, 90.0) / "result.json").write_text(content)
    with pytest.raises(TableError, match=rf"cannot read the run of .*result\.json: .*{why}"):
        read_runs(tmp_path)


def test_the_loader_that_read_makes_another_row_and_not_how_it_was_asked_for(tmp_path: Path) -> None:
    for seed, (asked, kind) in enumerate([("auto", "memory"), ("torch", "memory"), ("auto", "ffcv")]):
        result = write(tmp_path, seed, 90.0, loader=asked) / "result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"loader": kind}))
    lines = table(read_runs(tmp_path))
    assert [(line[2].rpartition(", ")[2], line[6]) for line in lines] == [("loader ffcv", "1"), ("loader memory", "2")]


def test_what_may_change_on_resume_makes_no_other_row() -> None:
    assert PLACE == FREE_ON_RESUME


def test_what_a_branch_is_worth_stands_beside_accuracy(tmp_path: Path) -> None:
    for algorithm, worth in (("standard", (8.0, 4.0)), ("rdp", (1.0, 2.0))):
        folder = write(tmp_path, 0, 90.0, algorithm=algorithm)
        result = json.loads((folder / "result.json").read_text())
        result["lesions"] = {"table": [{"name": f"{i}", "metric": 90 - w, "worth": w} for i, w in enumerate(worth)]}
        (folder / "result.json").write_text(json.dumps(result))
    write(tmp_path, 0, 90.0, algorithm="droppath")
    found = {algorithm: line["a branch"] for (_, algorithm), line in cells(tmp_path).items()}
    assert found == {"standard": "6.00", "rdp row": "1.50", "droppath row": ""}
