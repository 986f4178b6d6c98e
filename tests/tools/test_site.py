"""The site: it builds without a warning, has every public name, loads nothing from elsewhere, and its search finds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import lunr
import pytest

import rdp
import rdp.analysis
import rdp.tensorboard

ROOT = Path(__file__).parents[2]
MODULES = [rdp, rdp.rate_schedules, rdp.analysis, rdp.tensorboard]
SETTINGS = "docs/site/mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", SETTINGS, "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def listed(module: ModuleType) -> set[str]:
    """The names in the section of docs/api.md for a module."""
    section = (ROOT / "docs/api.md").read_text().split(f"## `{module.__name__}`\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_its_entry(module: ModuleType, site: Path) -> None:
    names = {f"{module.__name__}.{name}" for name in module.__all__}
    assert listed(module) - {"rdp.check.Checkup"} == names  # which a method returns, and nobody makes
    page = (site / f"api/{module.__name__}.html").read_text()
    assert [name for name in names - {"rdp.rate_schedules"} if f'id="{name}"' not in page] == []


@pytest.mark.parametrize("kind", [rdp.ResidualDropPath, rdp.MaskedOptimizer], ids=lambda kind: kind.__name__)
def test_every_method_has_its_entry(kind: type, site: Path) -> None:
    page = (site / "api/rdp.html").read_text()
    methods = [name for name in vars(kind) if not name.startswith(("_", "register_"))]
    assert [name for name in methods if f'id="rdp.{kind.__name__}.{name}"' not in page] == []


def test_dir_shows_public_names_only() -> None:
    assert set(dir(rdp)) == {*rdp.__all__, "__version__"}


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text()
    names = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    assert [name for name in names if not re.search(rf'href="(\./)?{name}\.html"', start)] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loading = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert loading.findall(text) == [], page
        assert 'class="mermaid"' not in text, f"{page}: for diagrams the theme would load a script from elsewhere"
    for style in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//|@import", style.read_text()) == [], style


@pytest.fixture(scope="module")
def search(site: Path) -> Callable[[str], list[str]]:
    """The site's own index and lunr, asked as the theme asks: any word may go on, and titles weigh most."""
    index = json.loads((site / "search/search_index.json").read_text())
    weight = index["config"]["fields"]["title"]["boost"]

    def words(text: str) -> str:
        return " ".join(re.split(index["config"]["separator"], re.sub("<[^>]*>", " ", text)))

    documents = [
        ({"location": each["location"], "title": words(each["title"]), "text": words(each["text"])}, {"boost": boost})
        for each in index["docs"]
        for boost in [each.get("boost", 1)]
    ]
    builder = lunr.get_default_builder()
    builder.pipeline.reset()
    builder.pipeline.add(lunr.trimmer.trimmer)
    builder.search_pipeline.reset()
    built = lunr.lunr("location", [{"field_name": "title", "boost": weight}, "text"], documents, builder=builder)
    return lambda query: [each["ref"] for each in built.search(" ".join(f"{word}*" for word in query.split()))]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("how do I resume", "faq.html#how-do-i-resume-a-run"),
        ("which optimizer", "faq.html#which-optimizer-can-i-use"),
        ("why dense", "faq.html#why-is-a-branch-dense"),
        ("steps slower", "faq.html#why-do-my-steps-get-slower"),
        ("LoRA", "faq.html#what-about-lora-and-other-adapters"),
        ("attach", "api/rdp.html#rdp.attach"),
    ],
)
def test_a_question_is_answered_within_one_search(
    question: str, answer: str, search: Callable[[str], list[str]]
) -> None:
    assert answer in search(question)[:5]
