"""From the text of a chapter (book/src/NN_slug.md) to the cells of its notebook (book/NN_slug.ipynb), unexecuted.

The same text always gives the same bytes: cell ids are hashes, and nothing names a machine or a moment.
"""

import hashlib
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbformat.notebooknode import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"

METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
SETUP = """\
# Installs the library where it is missing, as in Colab; does nothing elsewhere.
import importlib.util, os, subprocess, sys
if importlib.util.find_spec("cratelab") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", os.environ.get("CRATELAB_SOURCE", "git+{url}")])"""


def slugs(book: Path = BOOK) -> list[str]:
    """The chapters, in order: the stems of book/src/*.md."""
    return sorted(path.stem for path in (book / "src").glob("[0-9][0-9]_*.md"))


def repository_url(book: Path = BOOK) -> str:
    """The only place that states the repository's address is book/_config.yml."""
    return yaml.safe_load((book / "_config.yml").read_text(encoding="utf8"))["repository"]["url"]


def generate(slug: str, book: Path = BOOK) -> NotebookNode:
    """The notebook of a chapter, not executed: its text's cells, with the set-up cell after the first."""
    path = book / "src" / f"{slug}.md"
    cells = jupytext.read(path, fmt="md:myst").cells
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        raise ValueError(f"{path}: a chapter starts with a Markdown cell whose first line is its title, '# …'")
    setup = nbformat.v4.new_code_cell(SETUP.format(url=repository_url(book)), metadata={"tags": ["hide-cell"]})
    cells.insert(1, setup)
    seen: set[str] = set()
    for cell in cells:
        cell.id = cell_id(cell, seen)
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def cell_id(cell: NotebookNode, seen: set[str]) -> str:
    """A hash of the cell's label (`:label:`), else of its content; repeats are numbered. Adds the id to `seen`."""
    key = cell.metadata.get("label") or f"{cell.cell_type}\n{cell.source}"
    base = candidate = hashlib.sha256(key.encode()).hexdigest()[:12]
    repeat = 1
    while candidate in seen:
        repeat += 1
        candidate = f"{base}-{repeat}"
    seen.add(candidate)
    return candidate


def read(slug: str, book: Path = BOOK) -> NotebookNode | None:
    """The committed notebook of a chapter, or None where there is none."""
    path = book / f"{slug}.ipynb"
    return nbformat.read(path, as_version=4) if path.exists() else None


def differences(slug: str, book: Path = BOOK) -> list[str]:
    """How the notebook differs from its text, outputs and execution counts apart; empty if the pair is in sync."""
    have, want = read(slug, book), generate(slug, book)
    if have is None:
        return [f"book/{slug}.ipynb does not exist"]
    found = []
    if have.metadata != want.metadata:
        found.append(f"notebook metadata is {dict(have.metadata)}, expected {dict(want.metadata)}")
    if len(have.cells) != len(want.cells):
        found.append(f"it has {len(have.cells)} cells, the text gives {len(want.cells)}")
    for number, (old, new) in enumerate(zip(have.cells, want.cells, strict=False), start=1):
        for field in ("cell_type", "source", "id", "metadata"):
            if old.get(field) != new.get(field):
                found.append(f"cell {number} differs in {field}: it starts {old.source[:50]!r}")
                break
    return found
