"""docs/vit.ipynb: it runs from the first cell to the last, and what is committed of it shows nothing of a machine."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "vit.ipynb"


def test_what_is_committed_is_whole_and_of_no_machine() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "pip install" in "".join(code[0]["source"])  # for Colab
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert NOTEBOOK.stat().st_size < 300_000
    printed = "".join(line for output in outputs for line in output.get("text", []))
    assert "sound" in printed
    assert not re.search(r"/(?:tmp|root|home|work|usr|Users)\b|Traceback|Warning", printed)


@pytest.mark.slow
def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDP_NOTEBOOK_STEPS", "12")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any(output.get("text", "").startswith("test accuracy after 12 steps") for output in outputs)
