"""What is promised is tested from outside: these folders name nothing of the library below its public names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rdp

FILES = [
    file
    for folder in ("laws", "models", "distributed", "integrations")
    for file in sorted((Path(__file__).parents[1] / folder).glob("*.py"))
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_only_public_names_are_used(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                assert not any(name.name.startswith("rdp.") for name in names)
            case ast.ImportFrom(module=str(module)):
                assert module.split(".")[0] != "rdp"
            case ast.Attribute(value=ast.Name(id="rdp"), attr=name):
                assert name in rdp.__all__
            case ast.Attribute(value=ast.Name(id=handle), attr=name) if handle.endswith("handle"):
                assert not name.startswith("_")
