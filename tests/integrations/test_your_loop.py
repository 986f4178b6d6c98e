"""docs/your_loop.md: its code runs, or stands in an example that is tested; what it says is refused is refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from digits import digits, small_vit
from test_schedule_free_and_sam import SAM

import rdp

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your_loop.md").read_text()
BLOCKS = re.findall(r"(From \[(\S+)\][^\n]*\n\n)?```python\n(.*?)```", PAGE, re.DOTALL)
SNIPPETS = [code for _, source, code in BLOCKS if not source]
COPIES = [(source, code) for _, source, code in BLOCKS if source]
REFUSED = re.findall(r"^\| `(.+?)` \| `(\w+Error)` \|", PAGE, re.MULTILINE)


def names(tmp_path: Path, attached: bool) -> dict[str, Any]:
    """What the page's code may refer to."""
    torch.manual_seed(0)
    model = small_vit()
    loader = [digits(64)[start : start + 8] for start in range(0, 64, 8)]
    scope: dict[str, Any] = {"rdp": rdp, "torch": torch, "timm": timm, "SAM": SAM, "model": model, "loader": loader}
    scope |= {"loss_fn": torch.nn.functional.cross_entropy, "images": loader[0][0], "device": "cpu"}
    scope |= {"path": tmp_path / "checkpoint.pt", "other": small_vit()}
    # Stand-ins; tests/tensorboard/test_loggers.py runs the functions against the real packages.
    logger = SimpleNamespace(log=lambda *_, **__: None, Image=lambda image: image)
    scope |= {"probe": loader[0][0][:2], "wandb": logger}
    scope["body_parameters"] = [p for name, p in model.named_parameters() if not name.startswith("head")]
    scope["head_parameters"] = list(model.head.parameters())
    if attached:
        scope["handle"] = rdp.attach(model, rate=0.5, mode="batch")
        scope["optimizer"] = scope["handle"].wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    return scope


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.strip().splitlines()[0])
def test_a_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = names(tmp_path, attached="rdp.attach(" not in code)
    if "schedulefree" in code:
        scope["schedulefree"] = pytest.importorskip("schedulefree")
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiling(module, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)
        exec(compile(code, "docs/your_loop.md", "exec"), scope)
        handle = scope["handle"]
        if "loader:" not in code and "enumerate" not in code:  # it makes things ready: does training work now?
            for images, labels in scope["loader"]:
                scope["optimizer"].zero_grad()
                scope["loss_fn"](scope["model"](images), labels).backward()
                scope["optimizer"].step()
    steps = 8 * code.count("range(2)") * 2 or (4 if "step % 2" in code else 8)
    assert handle.step_count == steps
    assert handle.check().ok, str(handle.check())


@pytest.mark.parametrize(("source", "code"), COPIES, ids=[source for source, _ in COPIES])
def test_a_copy_stands_in_its_example(source: str, code: str) -> None:
    lines = iter((ROOT / "recipes" / "integrations" / source).read_text().splitlines())
    for line in code.splitlines():
        assert line in lines, f"{line!r} is not in {source}, or not in this order"


@pytest.mark.parametrize(("code", "error"), REFUSED, ids=[code for code, _ in REFUSED])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_is_refused_says_so(code: str, error: str, tmp_path: Path) -> None:
    scope = names(tmp_path, attached=True)
    scope["optimizer"] = scope["optimizer"].optimizer
    if "schedulefree" in code:
        scope["schedulefree"] = pytest.importorskip("schedulefree")
    if "accelerator" in code:
        scope["accelerator"] = pytest.importorskip("accelerate").Accelerator(cpu=True)
    with pytest.raises(getattr(rdp, error)) as refusal:
        exec(code, scope)
    assert len(str(refusal.value)) > 30


def test_the_page_was_read() -> None:
    assert len(SNIPPETS) == PAGE.count("```python") - len(COPIES) == 10
    assert len(COPIES) == 4
    assert len(REFUSED) == sum(line.startswith("| `") and "Error` |" in line for line in PAGE.splitlines()) == 13
    for link in re.findall(r"\]\((\.\./\S+?)\)", PAGE):
        assert (ROOT / "docs" / link).exists()
