"""docs/after_attach.md: what it says is told is told, and what it says is fine raises no alarm."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits, small_vit

import rdp

PAGE = (Path(__file__).parents[2] / "docs" / "after_attach.md").read_text()
LOOP = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
TOLD = re.findall(r"^\| `([^`]+)` \| `(\w+)` \|", PAGE, re.MULTILINE)
FINE = re.findall(r"^\| `([^`]+)` \| [^`]", PAGE, re.MULTILINE)


def train(code: str, tmp_path: Path) -> rdp.ResidualDropPath:
    """Train for two cycles as it should be, and for two in which the code takes the place of a line, or comes first."""
    torch.manual_seed(0)
    model = small_vit()
    images, labels = digits(8).tensors
    handle = rdp.attach(model, rate=0.5)
    scope: dict[str, Any] = {"rdp": rdp, "torch": torch, "copy": copy, "path": tmp_path / "model.pt"}
    scope |= {"model": model, "images": images, "labels": labels, "loss_fn": torch.nn.functional.cross_entropy}
    scope |= {"handle": handle, "optimizer": handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))}
    replaced = next((end for end in (".backward()", ".step()") if code.endswith(end)), None)
    for step in range(8):
        if step == 4 and not replaced:
            exec(code, scope)
        for line in LOOP:
            exec(code if step >= 4 and replaced and line.endswith(replaced) else line, scope)
    return handle


@pytest.mark.parametrize(("code", "kind"), TOLD, ids=[code for code, _ in TOLD])
def test_what_is_told(code: str, kind: str, tmp_path: Path) -> None:
    told = getattr(rdp, kind)
    with pytest.warns(told) if issubclass(told, Warning) else pytest.raises(told):
        train(code, tmp_path)


@pytest.mark.parametrize("code", FINE)
def test_what_is_fine(code: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        handle = train(code, tmp_path)
    assert handle.step_count == 8
    assert handle.check().ok, str(handle.check())


def test_the_page_was_read() -> None:
    assert len(LOOP) == 3
    assert len(TOLD) == 9
    assert len(FINE) == 7
