"""What every generated notebook shares: metadata, the set-up cell, ids that are hashes, and how two are compared.

The same cells always give the same bytes: nothing names a machine or a moment.
"""

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from nbformat.notebooknode import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"

# What an address elsewhere must look like, beside https and a host with a dot.
FORMS = {"arxiv.org": r"/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?", "doi.org": r"/10\.\d{4,9}/\S+"}

METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
TITLE = "#@title"  # opens the first line of a cell that Colab shows as a form
SETUP = """\
# Installs the library where it is missing, as in Colab; does nothing elsewhere.
import importlib.util, os, subprocess, sys
if importlib.util.find_spec("cratelab") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", os.environ.get("CRATELAB_SOURCE", "git+{url}")])"""


def repository_url(book: Path = BOOK) -> str:
    """The only place that states the repository's address is book/_config.yml."""
    return _repository(book)["url"]


def github_url(path: str, book: Path = BOOK) -> str:
    """Where a file of the repository is shown."""
    return f"{repository_url(book)}/blob/{_repository(book)['branch']}/{path}"


def colab_url(path: str, book: Path = BOOK) -> str:
    """Where a notebook of the repository opens in Colab."""
    return github_url(path, book).replace("https://github.com", "https://colab.research.google.com/github")


def _repository(book: Path) -> dict:
    return yaml.safe_load((book / "_config.yml").read_text(encoding="utf8"))["repository"]


def address_problem(link: str) -> str | None:
    """What is wrong with an address on the web, by its form, or by the file if it names one of the repository's."""
    parts = urlsplit(link)
    file = re.search(rf"{urlsplit(repository_url()).path}/(?:blob|tree)/[^/]+/(.+)", unquote(parts.path))
    if parts.scheme in ("mailto", "javascript"):
        return None
    if parts.scheme != "https" or not re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc):
        return f"an odd address: {link}"
    if not re.fullmatch(FORMS.get(parts.netloc, ".*"), parts.path):
        return f"{parts.netloc} has no such address: {link}"
    if file and not (ROOT / file[1]).exists():
        return f"the repository has no {file[1]}"
    return None


def assemble(cells: list[NotebookNode], book: Path = BOOK, title: str = "") -> NotebookNode:
    """A notebook of these cells, not executed, with the set-up cell after the first, folded under a title if given."""
    setup = nbformat.v4.new_code_cell(SETUP.format(url=repository_url(book)), metadata={"tags": ["hide-cell"]})
    if title:
        fold(setup, title)
    cells = [cells[0], setup, *cells[1:]]
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


def fold(cell: NotebookNode, title: str) -> None:
    """Make a cell of code a form: Colab, which does not know hide-cell, shows its title and folds the code."""
    cell.source = f"{TITLE} {title}\n{cell.source}"
    cell.metadata["cellView"] = "form"


def without_title(code: str) -> str:
    """The code of a cell that may be a form."""
    return code.partition("\n")[2] if code.startswith(TITLE) else code


def compare(path: Path, want: NotebookNode) -> list[str]:
    """How a committed notebook differs from a generated one, outputs and execution counts apart."""
    if not path.exists():
        return [f"{path.parent.name}/{path.name} does not exist"]
    have = nbformat.read(path, as_version=4)
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
