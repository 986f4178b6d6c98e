"""The documents against the tree: links lead somewhere, tests that they name exist, and so do scripts and options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "recipes/data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGINE = ("mnist", "cifar10", "imagenet_ffcv", "char_gpt")
SHARED = {f"recipes/{name}.py" for name in ENGINE}  # they take the engine's options too


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" not in link:
            assert (page.parent / path).exists(), link
        if anchor and "://" not in link:
            assert anchor in anchors(page.parent / path if path else page), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_and_options_that_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(r"(?<![\w/])((?:recipes|tools)/[\w/]+\.(?:py|sh))((?: [^\n`#)]*)?)", text)
    for script, arguments in commands:
        if (ROOT / "tests" / script).exists():  # the name of a test
            continue
        source = (ROOT / script).read_text()
        if script in SHARED:
            source += (ROOT / "recipes/engine/config.py").read_text()
        for option in re.findall(r"--(?:no-)?([a-z][a-z-]*)", arguments):
            assert re.search(rf"\b{option.replace('-', '_')}\b", source), f"{script} has no --{option}"


def test_the_tests_that_prove_reliability_exist() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"`([\w/]*\.py)?::(\w+)`", text)
    assert len(named) > 80
    file = ""
    for path, test in named:
        file = path or file
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    everything = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in everything, f"there is no {name}"
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)`", page.read_text()):
        assert (ROOT / path).exists(), f"there is no {path}"


def test_the_readme_says_it_on_the_first_screen() -> None:
    first = (ROOT / "README.md").read_text().split("\n## ")[0]
    assert first.count("\n") <= 40
    for needed in ("rdp.attach(", "handle.wrap(", "recipes/spiral_mlp.py", "pytest", "![", "arxiv.org"):
        assert needed in first


def test_the_paper_is_cited_alike_everywhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CITATION.cff"):
        for needed in ("ResidualDroppath: Enhancing Feature Reuse over Residual Connections", "Sejik", "2411.09475"):
            assert needed in page.read_text()
