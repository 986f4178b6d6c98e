"""The character GPT: it learns, a character sees none that come later, and all of its branches run on rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import char_gpt
import pytest
import torch
from char_gpt import CharGpt
from data.text import read_python
from engine import command_line
from engine.main import main

import rdp
from rdp.tensorboard import Panels

TINY = ["--depth", "2", "--width", "16", "--heads", "2", "--context", "8", "--windows", "32", "--limit-test", "8"]


@pytest.mark.parametrize("algorithm", ["standard", "rdp"])
def test_it_learns(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        "--epochs",
        "3",
        "--warmup-epochs",
        "0",
        "--lr",
        "0.01",
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--no-progress",
    ]
    monkeypatch.setattr(sys, "argv", ["x", *TINY, *settings, "--algorithm", algorithm, "--out", str(tmp_path)])
    main(command_line(char_gpt.configure), char_gpt.run)
    lines = [json.loads(line) for line in (tmp_path / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["test_loss"] < lines[0]["test_loss"] < 4.7
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert (result["steps"], result["relative_flops"] < 1) == (6, algorithm == "rdp")


def test_the_pictures_show_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    class Seen(Panels):
        def __init__(self, handle, inputs, *args, tokens=None, **options) -> None:
            shown.append((inputs, tokens))
            super().__init__(handle, inputs, *args, tokens=tokens, **options)

    monkeypatch.setattr("engine.records.Panels", Seen)
    options = ["--epochs", "1", "--warmup-epochs", "0", "--seeds", "1", "--device", "cpu", "--panels", "2"]
    monkeypatch.setattr(sys, "argv", ["x", *TINY, *options, "--out", str(tmp_path)])
    main(command_line(char_gpt.configure), char_gpt.run)
    [(texts, tokens)] = shown
    vocabulary = read_python()[2]
    assert [vocabulary.index(token) for token in tokens] == texts[0].tolist()


def test_no_character_sees_a_later_one() -> None:
    model = CharGpt(characters=7, depth=2, width=16, heads=2, context=8).eval()
    text = torch.randint(7, (1, 8))
    other = text.clone()
    other[0, 5] = (other[0, 5] + 1) % 7
    before, after = model(text), model(other)
    torch.testing.assert_close(before[..., :5], after[..., :5])
    assert not torch.allclose(before[..., 5:], after[..., 5:])


def test_all_branches_run_on_rows() -> None:
    model = CharGpt(characters=7, depth=3, width=16, heads=2, context=8)
    handle = rdp.attach(model, example_inputs=torch.randint(7, (2, 8)))
    assert str(handle).count("  rows  ") == len(handle.branches) == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--heads", "5"], "--width 192 is no multiple of --heads 5"),
        (["--limit", "100"], "--limit is for images"),
        (["--augment", "none"], "--augment is for images"),
        (["--test-flip"], "--test-flip is for images"),
        (["--model-kwargs", "depth=3"], "--model-kwargs is for images"),
    ],
)
def test_what_cannot_be_built_is_named(
    wrong: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *wrong])
    with pytest.raises(SystemExit):
        main(command_line(char_gpt.configure), char_gpt.run)
    assert said in capsys.readouterr().err
