"""Small programs told something wrong: a sentence at once, not a traceback at the end, and never a silent success."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engine import RunError, explained

from tools import (
    benchmark,
    benchmark_launches,
    benchmark_loaders,
    benchmark_options,
    benchmark_overhead,
    elsewhere,
    model_coverage,
    shallower,
    study_report,
    table1,
)


def test_the_table_of_models_wants_a_place_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_coverage, "row", lambda entry: pytest.fail("discovery has begun"))
    (tmp_path / "other.md").write_text("# Something else")
    for document in ("missing.md", "other.md"):
        with pytest.raises(SystemExit, match=f"{document} has no place for the table"):
            model_coverage.main(write=Path(document))
    with pytest.raises(SystemExit, match=r"would put it in place of the whole in other\.md"):
        model_coverage.main(only=("swin_transformer",), write=Path("other.md"))
    assert (tmp_path / "other.md").read_text() == "# Something else"
    assert not (tmp_path / "coverage.jsonl").exists()


def test_the_table_of_other_code_bases_is_not_replaced_by_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "_installed", lambda package: package != "monai")
    monkeypatch.setattr(elsewhere, "examine", lambda model: pytest.fail(f"{model.title} is examined"))
    page = tmp_path / "models.md"
    page.write_text(text := f"before{elsewhere.BEGIN}{elsewhere.END}after")
    with pytest.raises(SystemExit, match="not all of it is installed; pip install monai"):
        elsewhere.main(write=page)
    with pytest.raises(SystemExit, match="not all of it is installed; pip install monai"):
        elsewhere.main(only=("monai",))
    with pytest.raises(SystemExit, match=r"would put it in place of the whole in .*models\.md"):
        elsewhere.main(only=("diffusers",), write=page)
    with pytest.raises(SystemExit, match=r"nothing is known as swims: choose among .*diffusers"):
        elsewhere.main(only=("swims",))
    assert page.read_text() == text


def test_an_unknown_family_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_coverage, "zoo", list)
    with pytest.raises(SystemExit, match="no family, package or model is called swims"):
        model_coverage.main(only=("swims",))


def test_benchmarks_say_which_numbers_make_no_sense() -> None:
    for wrong in ({"steps": 1}, {"branches": 0}, {"batch_size": -1}):
        with pytest.raises(SystemExit, match="--steps 2: a DROP and a FREEZE step"):
            benchmark_overhead.main(benchmark_overhead.Args(**wrong))
    with pytest.raises(SystemExit, match="timm has no model 'resnet51'"):
        benchmark_overhead.main(benchmark_overhead.Args(model="resnet51"))
    for wrong in ({"rounds": 0}, {"workers": 0}, {"photographs": 1}):
        with pytest.raises(SystemExit, match="--photographs 2: one of each class"):
            benchmark_loaders.main(benchmark_loaders.Config(**wrong))


@pytest.mark.parametrize("version", ["2.6.0", "3.1", "newest"])
def test_the_script_for_the_oldest_torch_names_a_wrong_version(version: str) -> None:
    script = Path(model_coverage.__file__).with_name("test_oldest.sh")
    run = subprocess.run(["bash", script, version], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (2, f"TORCH must be a version such as 2.6, not {version}\n")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"epochs": -1}, "--epochs must be at least 1, not -1"),
        ({"rate": 1.0}, "--rate must be at least 0 and below 1, not 1.0"),
        ({"lr": float("nan")}, "--lr must be a number up to"),
        ({"patch": 5}, "28 must be a multiple of --patch 5"),
        ({"dim": 6}, "--dim 6 one of 4"),
        ({"algorithms": ()}, "--algorithms names none"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before_it_is(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        shallower.Config(Path("data"), **wrong)


def test_what_shallower_measured_before_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shallower.Config(tmp_path / "no data", out=tmp_path / "out", algorithms=("rdp",))
    for content in ("", "[]", "null", '{"training": {}}', '{"training": {}, "lesions": 3}'):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "rdp-0.json").write_text(content)
        with pytest.raises(SystemExit), explained():
            shallower.main(config)
        assert "rdp-0.json is damaged" in capsys.readouterr().err
    (tmp_path / "out" / "rdp-0.json").unlink()
    with pytest.raises(SystemExit), explained():
        shallower.main(config)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "no data" in said
    with pytest.raises(RunError, match="there is no folder"):
        shallower.main(dataclasses.replace(config, picture=tmp_path / "none" / "picture.png"))


def test_records_that_are_none_and_a_page_that_is_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "gpt" / "standard" / "seed-0.json"
    path.parent.mkdir(parents=True)
    for content in (
        "",
        "[]",
        '{"commit": "a", "seconds": 1, "result": {}}',
        '{"commit": "a", "seconds": 1, "result": 3}',
    ):
        path.write_text(content)
        with pytest.raises(SystemExit, match=r"error: .*seed-0\.json is no record of a run"):
            study_report.main(tmp_path)
    with pytest.raises(SystemExit, match=r"missing\.md is no file"):
        study_report.main(tmp_path, page=tmp_path / "missing.md")
    with pytest.raises(SystemExit, match="error: "):
        table1.main(tmp_path / "nothing")


def test_models_and_sizes_that_are_none_are_named() -> None:
    with pytest.raises(SystemExit, match="no model is called vitt; there are "):
        benchmark_launches.main(benchmark_launches.Args(models=("vitt",)))


def test_options_of_the_benchmark_are_checked_before_anything_is_measured() -> None:
    for wrong, message in (
        ({"models": ("nope",)}, "timm has no model 'nope'"),
        ({"models": ()}, "name at least one each"),
        ({"contenders": ()}, "name at least one each"),
        ({"rates": (0.1, 1.0)}, r"--rates are in \[0, 1\)"),
        ({"batch_size": 0}, "sizes and --cycles are at least 1"),
        ({"models": ("vit_tiny_patch16_224",), "resolution": 8, "batch_size": 2}, "cannot take images of 8 pixels"),
    ):
        with pytest.raises(SystemExit, match=message):
            benchmark.main(benchmark_options.Args(**wrong))
    assert benchmark.checked(benchmark_options.Args()).device in ("cpu", "cuda")
