"""A checkpoint whose digest fits and whose content does not: any value of it, replaced by anything."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import RunError, checkpoint
from engine.folder import is_finished, read_json

from tests.recipes.engine.test_resume import cut_run
from tests.recipes.engine.tiny import tiny_config, train_tiny

VALUES: list[Any] = [
    None,
    0,
    -1,
    1.5,
    float("nan"),
    10**30,
    "",
    "text",
    [],
    {},
    True,
    torch.zeros(2, 7),
    torch.tensor(0),
]
SETTINGS: dict[str, Any] = {"algorithm": "rdp", "rate": 0.5, "ema": 0.9, "optimizer": "adamw", "lr": 0.01}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value, from the outside inwards; of many of a kind the first and the last."""
    if at:
        yield at
    if not isinstance(value, (dict, list, tuple)):
        return
    keys = list(value if isinstance(value, dict) else range(len(value)))
    if len(keys) > 4 and len({type(value[key]) for key in keys}) == 1:
        keys = [keys[0], keys[-1]]
    for key in keys:
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with the value at a place replaced, or left out if `new` is `...`."""
    if not at:
        return new
    items = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1 and new is ...:
        del items[at[0]]
    else:
        items[at[0]] = changed(items[at[0]], at[1:], new)
    return tuple(items) if isinstance(value, tuple) else items


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that was cut, and the content of its one checkpoint."""
    config = cut_run(tmp_path_factory.mktemp("cut"), **SETTINGS)
    folder = config.folder / "seed-0" / "checkpoints"
    content = checkpoint.load_latest(folder)
    assert content is not None
    return folder, content


def resume(folder: Path, content: Any) -> None:
    """Go on with this content alone."""
    for path in folder.glob("*.pt"):
        path.unlink()
    checkpoint.save(folder, content, 2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_tiny(tiny_config(folder.parents[1], **SETTINGS))


def test_any_value_of_a_checkpoint_replaced_by_anything_is_a_sentence_or_harmless(
    cut: tuple[Path, dict[str, Any]],
) -> None:
    folder, content = cut
    resume(folder, content)
    every = list(places(content))
    assert len(every) > 100
    said: dict[tuple[Any, ...], str] = {}
    # Each place with one value or left out, in turn, so that each kind of value meets each kind of place.
    for number, at in enumerate(every):
        new = [*VALUES, ...][number % (len(VALUES) + 1)]
        (folder.parent / "result.json").unlink(missing_ok=True)
        try:
            resume(folder, changed(content, at, copy.deepcopy(new)))
        except RunError as error:
            said[at] = str(error)
        except Exception as error:
            raise AssertionError(f"{at} = {new}") from error
    assert not [sentence for sentence in said.values() if "\n" in sentence]
    assert len(said) > len(every) // 2


@pytest.mark.parametrize("content", [[], None, {}, "text", 5, torch.zeros(3)])
def test_content_that_is_something_else_falls_back_to_the_checkpoint_before(
    content: Any, cut: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, sound = cut
    folder = tmp_path / "seed-0" / "checkpoints"
    folder.parent.mkdir()
    checkpoint.save(folder, sound, 2, 0)
    checkpoint.save(folder, content, 2, 1)
    with pytest.warns(UserWarning, match="skipping the damaged checkpoint .*: it"):
        result = train_tiny(tiny_config(tmp_path, **SETTINGS))
    assert result["epochs"] == 3


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", "\xff", "[" * 100_000])
def test_settings_that_are_no_settings_are_named(content: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    file = tmp_path / "seed-0" / "config.json"
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=f"{file} (is not valid JSON|holds .* and no settings).*: remove it, and go on"):
        is_finished(config, 0)
    file.write_text("{}")
    assert read_json(file) == {}
