"""What TensorBoard shows, asked over HTTP: descriptions, settings beside the last numbers, the layout, texts."""

from __future__ import annotations

import io
import json
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as pil
from served import RUNS, tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdp.tensorboard.tags import SORTED_BY, TAGS

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(spiral_runs: Path) -> Iterator[Ask]:
    with tensorboard(spiral_runs / "0", "--load_fast=false") as address:

        def ask(path: str, post: dict[str, Any] | None = None, **query: object) -> Any:
            url = f"{address}data/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
            data = None if post is None else json.dumps(post).encode()
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
                return content if answer.headers.get_content_type() == "image/png" else json.loads(content)

        until = time.monotonic() + 60
        # It reads the files after it has begun to answer; what is written last is read last.
        while not all("final/top1" in ask("plugin/scalars/tags").get(run, {}) for run in RUNS):
            assert time.monotonic() < until
            time.sleep(0.1)
        yield ask


def test_every_chart_and_picture_has_its_description(ask: Ask) -> None:
    scalars, images = ask("plugin/scalars/tags"), ask("plugin/images/tags")
    assert sorted(scalars) == sorted(images) == RUNS
    for run in RUNS:
        for tag, shown in {**scalars[run], **images[run]}.items():
            assert shown["description"].startswith("<p>"), tag
        assert {"train/loss", "train/lr", "train/gradient_norm", "test/top1", "rdp/learning_rows"} <= set(scalars[run])
        assert set(images[run]) >= {"features/nodes", "features/similarity", "lesions"}
    assert "Training loss" in scalars["rdp"]["train/loss"]["description"]
    assert "In FREEZE steps alone. Training loss" in scalars["rdp"]["freeze/loss"]["description"]
    assert TAGS["features/nodes"][:20] in images["rdp"]["features/nodes"]["description"]


def test_pictures_are_served_whole(ask: Ask) -> None:
    samples = ask("plugin/images/images", run="rdp", tag="features/nodes", sample=0)
    assert len(samples) >= 2  # the slider
    for sample in samples:
        query = sample["query"]
        with pil.open(io.BytesIO(ask(f"plugin/images/individualImage?{query}"))) as image:
            assert min(image.size) > 200


def test_steps_are_optimizer_steps_on_every_axis(ask: Ask) -> None:
    for tag in ("test/top1", "final/top1", "feature_reuse/reused"):
        points = ask("plugin/scalars/scalars", run="rdp", tag=tag)
        assert points[-1][1] == 4, tag  # 2 epochs of 512 points, 256 a step
    assert 0 < ask("plugin/scalars/scalars", run="rdp", tag="test/top1")[-1][2] <= 100


def test_settings_stand_beside_the_last_numbers(ask: Ask) -> None:
    experiment = ask("plugin/hparams/experiment", post={"experimentName": "", "includeMetrics": True})
    columns = {column["name"] for column in experiment["hparamInfos"]}
    assert {"algorithm", "rate", "depth", "lr", "seed"} <= columns
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics == list(SORTED_BY)
    by_accuracy = {"metric": {"tag": "test/top1"}, "order": "ORDER_DESC"}
    groups = ask(
        "plugin/hparams/session_groups",
        post={
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS"],
            "colParams": [by_accuracy],
            "startIndex": 0,
            "sliceSize": 10,
        },
    )["sessionGroups"]
    values = [next(m["value"] for m in group["metricValues"] if m["name"]["tag"] == "test/top1") for group in groups]
    assert sorted(group["hparams"]["algorithm"] for group in groups) == RUNS
    assert values == sorted(values, reverse=True)


def test_the_layout_shows_the_charts_that_matter(ask: Ask) -> None:
    layout = ask("plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["Learning", "Residual DropPath", "Feature reuse"]
    for category in layout["category"]:
        for chart in category["chart"]:
            answers = [ask("plugin/custom_scalars/scalars", run="rdp", tag=tag) for tag in chart["multiline"]["tag"]]
            assert all(answer["regex_valid"] for answer in answers), chart["title"]
            assert any(answer["tag_to_events"] for answer in answers), chart["title"]


def test_the_texts_hold_the_settings_and_the_table_of_branches(ask: Ask) -> None:
    texts = ask("plugin/text/tags")
    assert {tag.removesuffix("/text_summary") for tag in texts["rdp"]} == {"settings", "model"}
    for name, content in {"settings": "batch_size", "model": "ResidualDropPath(ResidualMLP"}.items():
        tag = next(tag for tag in texts["rdp"] if tag.startswith(name))
        assert content in ask("plugin/text/text", run="rdp", tag=tag)[0]["text"]


def test_reading_the_files_raises_no_warning(spiral_runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tags = EventAccumulator(str(spiral_runs / "0" / "rdp")).Reload().Tags()
    assert {"train/loss", "features/nodes"} <= set(tags["tensors"])
    assert not caplog.records
