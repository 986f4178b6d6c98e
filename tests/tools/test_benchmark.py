"""tools/benchmark.py measures every contender it names, and its figures are those of the arithmetic in docs/cost.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tools import benchmark, benchmark_contenders, benchmark_options


def rows_of(path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    benchmark.main(benchmark_options.Args(json_file=path, **options))
    return {row["contender"]: row for row in json.loads(path.read_text())}


def test_every_name_has_a_contender() -> None:
    made = [benchmark_contenders.RDP, benchmark_contenders.GATES, benchmark_contenders.BLOCKS]
    assert sorted(name for kind in made for name in kind) == sorted(get_args(benchmark_options.Name))


def test_what_is_left_out_costs_nothing_and_masks_cost_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("row-fixed", "row-dense", "drop-fixed", "mask", "index-add", "whole-blocks")
    options = {"contenders": names, "resolution": 64, "batch_size": 10, "cycles": 2}
    rows = rows_of(tmp_path / "rows.json", models=("test_vit",), rounds=1, **options)
    assert list(rows) == list(names)
    printed = capsys.readouterr().out
    assert all(f"| test_vit | {name} | 0.1 |" in printed for name in names)
    share = (1 - rows["index-add"]["flops"]["train"]) / 0.1  # of branches, in the FLOPs of the model
    assert 0.5 < share < 1
    fixed = rows["row-fixed"]["flops"]
    assert fixed["DROP"] == rows["drop-fixed"]["flops"]["DROP"] == pytest.approx(1 - 0.1 * share, abs=1e-6)
    assert fixed["FREEZE"] == pytest.approx(1 - 0.6 * share, abs=0.03)  # the forward is a third of a step, or so
    assert rows["mask"]["flops"]["train"] == rows["row-dense"]["flops"]["DROP"] == 1
    assert rows["mask"]["peaks"]["train"] == pytest.approx(1, abs=0.01)
    assert rows["row-fixed"]["peaks"]["FREEZE"] < 0.5 < rows["row-fixed"]["peaks"]["DROP"] < 1


@pytest.mark.slow
def test_a_contender_that_there_is_nothing_to_measure_of_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"resolution": 32, "batch_size": 2, "cycles": 1, "rounds": 0}
    contenders = (*benchmark_options.Args.contenders, "index-add")
    rows = rows_of(tmp_path / "rows.json", models=("resnet10t",), contenders=contenders, **options)
    assert list(rows) == ["row", "batch", "row-ghost", "batch-ghost", "timm", "torchvision", "mask"]
    printed = capsys.readouterr().out
    assert "- resnet10t, row-dense: it runs as one above does" in printed
    assert "- resnet10t, index-add: it is for timm's VisionTransformer" in printed


@pytest.mark.slow
def test_compiled_models_are_counted_in_their_graphs(tmp_path: Path) -> None:
    options = {"models": ("test_vit",), "resolution": 64, "batch_size": 10, "cycles": 3, "rounds": 0}
    whole = rows_of(tmp_path / "whole.json", compiled="whole", contenders=("row-fixed",), **options)["row-fixed"]
    blocks = rows_of(tmp_path / "blocks.json", compiled="blocks", contenders=("batch",), **options)["batch"]
    for row, most in ((whole, 3), (blocks, 8)):
        assert 0 < row["graphs"] <= most
        assert row["flops"]["FREEZE"] < 0.6 < row["flops"]["DROP"] <= 1
        assert row["peaks"] == {}
