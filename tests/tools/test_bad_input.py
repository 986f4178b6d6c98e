"""Small programs told something wrong: a sentence at once, not a traceback at the end, and never a silent success."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import benchmark_loaders, benchmark_overhead, model_coverage


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
