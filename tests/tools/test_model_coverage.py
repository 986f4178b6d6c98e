"""The column of docs/models.md on the models' own DropPath."""

from __future__ import annotations

import pytest
from models.zoo import zoo

from tools.model_coverage import own_drop_paths


@pytest.mark.parametrize(
    ("name", "calls", "elsewhere"), [("test_vit", 10, 0), ("mobilevit_xxs", 24, 4), ("rdnet_tiny", 20, 20)]
)
def test_calls_of_the_models_own_drop_paths_are_counted(name: str, calls: int, elsewhere: int) -> None:
    (entry,) = [e for e in zoo() if e.name == name]
    assert own_drop_paths(entry) == (calls, elsewhere)


def test_a_model_that_drops_no_paths_has_none() -> None:
    (entry,) = [e for e in zoo() if e.key == "timm/densenet121"]
    assert own_drop_paths(entry) is None
