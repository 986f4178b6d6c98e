"""Whatever a user types: the setting is taken as it was meant, or refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from cifar10 import Cifar10Config
from engine import Config, Range, RunError, parse
from engine.ranges import ranges
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from imagenet_ffcv import ImagenetConfig
from mnist import MnistConfig

from tests.recipes.engine.tiny import tiny_config, train_tiny

RECIPES = [MnistConfig, Cifar10Config, ImagenetConfig]
TYPED = st.one_of(
    st.integers().map(str),
    st.sampled_from([10**12, -(10**12), 10**400]).map(str),
    st.floats().map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "-0.0", "True", "None", "", " ", "0x10", "1,2", "ï", "1e-400"]),
    st.text("ab01-._/ é", max_size=6),
).filter(lambda text: text.strip() != "--")  # the end of options, not a value


def read(kind: type[Config], typed: list[str]) -> tuple[Config | None, str]:
    """The configuration, or what was said when it was refused in a documented way."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(kind, typed), ""
    except RunError as error:
        return None, str(error)
    except SystemExit:
        return None, re.sub(r"[\s│]", "", said.getvalue())  # tyro draws a box and breaks lines


@pytest.mark.parametrize("kind", RECIPES)
@settings(max_examples=60)
@given(data=st.data(), value=TYPED)
def test_any_text_for_any_setting_is_read_or_refused_by_name(
    kind: type[Config], data: st.DataObject, value: str
) -> None:
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(kind)]))
    flag = f"--{field.replace('_', '-')}"
    config, said = read(kind, [f"{flag}={value}"])
    if config is None:
        assert flag in said or re.sub(r"\s", "", value) in said  # a flag takes no value: that is what is not recognized
        return
    taken = getattr(config, field)
    if isinstance(taken, float | int) and not isinstance(taken, bool):
        assert taken == (int if isinstance(taken, int) else float)(value)
        assert math.isfinite(taken)
    elif isinstance(taken, tuple):  # any number of values
        assert taken == (value,)
    else:
        assert str(taken) == (str(Path(value)) if isinstance(taken, Path) else value)


@pytest.mark.parametrize("kind", RECIPES)
@given(data=st.data())
def test_a_number_outside_of_its_range_is_named_with_its_value(kind: type[Config], data: st.DataObject) -> None:
    name, allowed = data.draw(st.sampled_from(sorted(ranges(kind), key=lambda item: item[0])))
    value = data.draw(st.one_of(st.integers(), st.floats()).filter(lambda number: number not in allowed))
    with pytest.raises(RunError) as refused:
        kind(**{name: value})
    assert str(refused.value).startswith(f"--{name.replace('_', '-')} must be ")
    assert str(refused.value).endswith(f", not {value}")


@pytest.mark.parametrize("kind", RECIPES)
def test_every_number_has_a_range(kind: type[Config]) -> None:
    numbers = {f.name for f in dataclasses.fields(kind) if "int" in str(f.type) or "float" in str(f.type)}
    assert numbers == {name for name, _ in ranges(kind)}


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (Range(0, below=1), [0, 0.5], [-1e-9, 1, math.nan, math.inf, -math.inf], "at least 0 and below 1"),
        (Range(above=0), [1e-300, 1e30, 10**30], [0, -1, math.nan, 1e31, 10**400], "above 0"),
        (Range(1, most=9), [1, 9], [0, 10], "at least 1 and at most 9"),
    ],
)
def test_a_range_has_the_limits_that_it_says(
    allowed: Range, inside: list[float], outside: list[float], words: str
) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == words


HOSTILE = {
    "algorithm": st.sampled_from(["standard", "droppath", "rdp"]),
    "mode": st.sampled_from(["row", "batch"]),
    "rate": st.sampled_from([0.0, 1e-300, 0.5, 1 - 1e-9]),
    "lr": st.sampled_from([0.0, 1e-300, 0.1, 1e30]),
    "momentum": st.sampled_from([0.0, 0.9, 1 - 1e-9]),
    "weight_decay": st.sampled_from([0.0, 1e-300, 1e30]),
    "label_smoothing": st.sampled_from([0.0, 1 - 1e-9]),
    "clip_grad": st.sampled_from([None, 1e-300, 1e30]),
    "ema": st.sampled_from([None, 1e-300, 1 - 1e-9]),
    "seed": st.sampled_from([0, 2**32 - 1]),
    "accumulate": st.sampled_from([1, 2, 16]),
    "match": st.sampled_from(["steps", "cost"]),
}


@settings(max_examples=20, phases=[Phase.generate])  # each is a run: too slow to shrink
@given(chosen=st.fixed_dictionaries(HOSTILE))
def test_whatever_is_accepted_trains_or_stops_with_a_sentence(
    chosen: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tiny_config(tmp_path_factory.mktemp("out"), **chosen, epochs=1, warmup_epochs=0.5)
    try:
        result = train_tiny(config, batches=2)
    except RunError as error:
        assert "loss of epoch 1 is" in str(error) or "optimizer" in str(error)  # noqa: PT017
    else:
        assert math.isfinite(result["top1"])
