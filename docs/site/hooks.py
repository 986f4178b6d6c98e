"""What the site has beyond the pages in docs/, which are written to be read as plain files too.

- Reference pages: one for each section of api.md, with an entry for each name in its table.
- Names in the text (`rdp.attach`, `handle.check()`) lead to their entries.
- Files outside of docs/ that a page links to are shown as pages, so that the site needs no other place.
- The notebook is shown as a page.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"\]\(\.\./([\w/]+\.(?:py|sh))\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<!\[)`((?:rdp|handle)\.[\w.]+)(\([^`]*\))?`(?!\])")


def sections() -> dict[str, list[str]]:
    """The public names, by the module whose section in api.md has them, in the order there."""
    parts = re.split(r"^## `([\w.]+)`", (DOCS / "api.md").read_text(), flags=re.MULTILINE)[1:]
    names = (re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE) for text in parts[1::2])
    listed = dict(zip(parts[::2], names, strict=True))
    return {module: [name for name in names if name not in listed] for module, names in listed.items()}


ENTRIES = {name: name for names in sections().values() for name in names}
ENTRIES |= {
    f"handle.{name}": f"rdp.ResidualDropPath.{name}"
    for name in re.findall(r"^    def ([a-z]\w*)", (ROOT / "rdp/handle.py").read_text(), re.MULTILINE)
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that no file in docs/ holds."""
    for module, names in sections().items():
        text = "\n\n".join([f"# {module}", *(f"::: {name}" for name in names)])
        files.append(File.generated(config, f"api/{module}.md", content=text))
    for path in linked():
        hidden = "---\nsearch: {exclude: true}\n---\n"
        text = f"{hidden}# {path}\n\n```{Path(path).suffix[1:]}\n{(ROOT / path).read_text()}```\n"
        page = File.generated(config, f"source/{path}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    for notebook in DOCS.glob("*.ipynb"):
        add_notebook(files, config, notebook)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to notebooks and files outside of docs/, and names, to their pages."""
    if page.file.src_uri == "faq.md":
        page.meta["search"] = {"boost": 2}  # who asks the search a question finds its answer first

    def entry(name: re.Match[str]) -> str:
        return f"[{name[0]}][{ENTRIES[name[1]]}]" if name[1] in ENTRIES else name[0]

    def line(text: str) -> str:
        text = LINK.sub(r"](source/\1.md)", text).replace(".ipynb)", ".md)")
        return text if text.startswith("#") else NAME.sub(entry, text)

    parts = FENCE.split(markdown)
    parts[::2] = ["\n".join(line(text) for text in part.split("\n")) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """`Example::` of docstrings announces code in reStructuredText; in Markdown its second colon is one too many."""
    return html.replace("::</p>", ":</p>")


def linked() -> set[str]:
    """The files outside of docs/ that its pages link to, seen from the root."""
    return {path for page in DOCS.glob("*.md") for path in LINK.findall(page.read_text())}


def add_notebook(files: Files, config: MkDocsConfig, path: Path) -> None:
    """A notebook as a page: its text, its code, what this printed, and its pictures."""
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{path.stem}-{number}.png"
                files.append(File.generated(config, picture, content=base64.b64decode(data["image/png"])))
                parts.append(f"![What the code above draws]({picture})")
            elif printed := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{printed.rstrip()}\n```")
    files.append(File.generated(config, f"{path.stem}.md", content="\n\n".join(parts)))
