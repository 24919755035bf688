"""What must hold of the chapters before the book is built, for `sync.py --check`, `make book` and tests/test_book.py.

Each check yields messages that name the file, what is wrong and what to do. No message: all is well.
"""

import base64
import io
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import nbformat
import numpy as np
from chapters import EXERCISE, differences, is_appendix, read, slugs
from matplotlib.image import imread
from nbformat.notebooknode import NotebookNode
from notebooks import BOOK, ROOT, address_problem

import exercises
from cratelab import plots

MAX_CELLS = 41
BOTH = "05"  # from this chapter on there are two networks, each with a colour of its own
# A misspelt tag would silently do nothing, so only these may be used. nbval-skip is not among them: every cell is run.
TAGS = {
    *("hide-input", "hide-output", "hide-cell", "remove-input", "remove-output", "remove-cell"),
    *("nbval-ignore-output", "raises-exception", "full-width", "margin", "scroll-output", "page-only"),
}
EQUATION = re.compile(r"^\$\$((?:(?!^\s*$).)*?)\$\$[ \t]*\(([^)\s]+)\)", re.MULTILINE | re.DOTALL)
LABEL = re.compile(r"eq-(\d\d)-[a-z0-9]+(?:-[a-z0-9]+)*")
REFERENCE = re.compile(r"\{eq\}`(?:[^`<]*<)?([^`>]+)>?`")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
# Outputs that hold a path would change from machine to machine.
PATHS = re.compile(r"/(?:home|Users|root|tmp)/\S+|/ipykernel_\S+")


def check_pair(slug: str, book: Path = BOOK) -> Iterator[str]:
    """The notebook is what its text gives: sources, ids and metadata."""
    for difference in differences(slug, book):
        yield f"book/{slug}.ipynb is out of sync with book/src/{slug}.md: {difference}. Run `make sync`."


def check_executed(slug: str, book: Path = BOOK) -> Iterator[str]:
    """Every code cell was executed, in order, without an error, a warning or a machine's path in its outputs."""
    notebook = read(slug, book)
    if notebook is not None:  # else check_pair says so
        yield from executed(notebook, f"book/{slug}.ipynb", f"book/src/{slug}.md")


def executed(notebook: NotebookNode, name: str, text: str) -> Iterator[str]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        counts = [cell.execution_count for cell in code]
        yield f"{name}: execution counts are {counts}, not 1 to {len(code)}. Run `make sync`."
    for number, cell in enumerate(code, start=1):
        where = f"{name}, code cell {number}"
        expects_error = "raises-exception" in cell.metadata.get("tags", [])
        kinds = [output.output_type for output in cell.outputs]
        if "error" in kinds and not expects_error:
            yield f"{where}: its stored output is an error. Mend {text} and run `make sync`."
        if expects_error and "error" not in kinds:
            yield f"{where}: tagged raises-exception, but nothing was raised. Remove the tag, or raise."
        if any(output.get("name") == "stderr" for output in cell.outputs):
            yield f"{where}: something was written to stderr, such as a warning. Mend its cause."
        if path := next((m for text in texts(cell.outputs) if (m := PATHS.search(text) or root_in(text))), None):
            yield f"{where}: its output names a path of this machine ({path[0]}). Print something else."


def root_in(text: str) -> re.Match | None:
    return re.search(re.escape(str(ROOT)), text)


def texts(outputs: list) -> Iterator[str]:
    """Every text stored in a cell's outputs."""
    for output in outputs:
        yield output.get("text", "")
        yield "\n".join(output.get("traceback", []))
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def check_cells(slug: str, book: Path = BOOK) -> Iterator[str]:
    """At most 41 cells, known tags only, and an assertion for every output that nbval is told to ignore."""
    notebook = read(slug, book)
    if notebook is None:
        return
    if len(notebook.cells) > MAX_CELLS:
        yield f"book/src/{slug}.md: {len(notebook.cells)} cells with the generated ones; at most {MAX_CELLS}. Split it."
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code):
        tags = set(cell.metadata.get("tags", []))
        if unknown := sorted(tags - TAGS):
            yield f"book/src/{slug}.md, code cell {number + 1}: unknown tag {unknown[0]!r}; known: {sorted(TAGS)}"
        beside = "".join(neighbour.source for neighbour in code[number : number + 2])
        if "nbval-ignore-output" in tags and "assert" not in beside:
            yield (
                f"book/src/{slug}.md, code cell {number + 1}: its output is not compared (nbval-ignore-output), "
                "so this cell or the next must assert what the reader should see"
            )


def check_figures(slug: str, book: Path = BOOK) -> Iterator[str]:
    """Every cell that draws says in words what its figure shows, and no other does; a network's colour means it."""
    notebook = read(slug, book)
    if notebook is None:
        return
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        draws = any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {}))
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        where = f"book/src/{slug}.md, code cell {number}"
        if draws and len(alt.split()) < 8:
            yield f'{where}: a figure needs an alt text, a sentence or two: `:alt: "…"` under ```{{code-cell}} python'
        if alt and not draws:
            yield f"{where}: it has an alt text and draws nothing"
        for name, colour in {"CRATE": plots.CRATE, "GPT-2": plots.GPT2}.items():
            if slug >= BOTH and name not in alt and colour in colours(cell.outputs):
                yield f"{where}: the colour of {name} ({colour}) is used, and the alt text does not speak of {name}"


def colours(outputs: list) -> set[str]:
    """The named colours, such as #0072B2, that fill a hundredth of a per cent of some PNG of a cell."""
    found = set()
    for output in outputs:
        if png := output.get("data", {}).get("image/png"):
            pixels = imread(io.BytesIO(base64.b64decode(png)))[..., :3].reshape(-1, 3)
            codes = (255 * pixels).round().astype(int) @ [1 << 16, 1 << 8, 1]
            values, counts = np.unique(codes, return_counts=True)
            found |= {f"#{value:06X}" for value in values[counts > 1e-4 * len(codes)]}
    return found


def equation_labels(book: Path = BOOK) -> set[str]:
    return {label for slug in slugs(book) for _, label in EQUATION.findall(source(slug, book))}


def source(slug: str, book: Path = BOOK) -> str:
    return (book / "src" / f"{slug}.md").read_text(encoding="utf8")


def check_equations(book: Path = BOOK, library: Path = ROOT / "cratelab") -> Iterator[str]:
    """A label is the number that the page prints, eq-NN-1, eq-NN-2, …; whatever refers to an equation finds it."""
    for slug in slugs(book):
        for k, (_, label) in enumerate(EQUATION.findall(source(slug, book)), start=1):
            if is_appendix(slug):
                yield f"book/src/{slug}.md labels an equation {label!r}; those of an appendix have no numbers"
                break
            if label != f"eq-{slug[:2]}-{k}":
                yield (
                    f"book/src/{slug}.md: the page prints ({int(slug[:2])}.{k}) beside an equation labelled {label!r}; "
                    f"expected eq-{slug[:2]}-{k}. Give a new equation a label that no other has, such as "
                    f"eq-{slug[:2]}-new, and run `python book/renumber.py`"
                )
                break  # those that follow are wrong by consequence
    labels = equation_labels(book)
    for path in [*sorted((book / "src").glob("*.md")), *sorted(book.glob("*.md"))]:
        for label in REFERENCE.findall(path.read_text(encoding="utf8")):
            if label not in labels:
                yield f"{path.relative_to(book.parent)}: {{eq}}`{label}` refers to no equation of the book"
    for path in sorted(library.rglob("*.py")):
        for label in sorted({match[0] for match in LABEL.finditer(path.read_text(encoding="utf8"))}):
            if label not in labels:
                yield f"{path.relative_to(library.parent)} cites {label}, which is no equation of the book"


def check_exercises(slug: str, book: Path = BOOK) -> Iterator[str]:
    """Both notebooks are what solutions/NN_slug.py gives; solutions are executed, exercises are not."""
    if not exercises.source(slug, book).exists():
        return
    if "\n## Exercises\n" not in source(slug, book):
        yield f"book/src/{slug}.md: its last section should be '## Exercises', where the links to them are put"
    for difference in exercises.differences(slug, book):
        yield f"out of sync with solutions/{slug}.py: {difference}. Run `make sync`."
    to_do, done = exercises.paths(slug, book)
    if done.exists():
        yield from executed(nbformat.read(done, as_version=4), f"solutions/{slug}.ipynb", f"solutions/{slug}.py")
    if to_do.exists() and any(cell.get("outputs") for cell in nbformat.read(to_do, as_version=4).cells):
        yield f"exercises/{slug}.ipynb has outputs, which are the reader's to make. Run `make sync`."


def check_names_of_exercises(book: Path = BOOK) -> Iterator[str]:
    """Where a chapter sends its reader to an exercise, there is one."""
    sources = {*exercises.slugs(book)} & {*slugs(book)}
    known = {exercise.number for slug in sources for exercise in exercises.read(slug, book)[1]}
    for slug in slugs(book):
        for name, _ in EXERCISE.findall(source(slug, book)):
            if name not in known:
                yield f"book/src/{slug}.md: there is no exercise {name}"


def check_links(root: Path = ROOT) -> Iterator[str]:
    """Links of the files that are read outside the book lead somewhere; those of its pages are for check_pages.py."""
    read_outside = "*.md", "book/reference/*.md", "exercises/*.ipynb", "solutions/*.ipynb"
    for path in chain(*map(root.glob, read_outside)):
        text = path.read_text(encoding="utf8")
        if path.suffix == ".ipynb":
            text = "\n".join(c.source for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "markdown")
        for link in LINK.findall(text):
            if "://" in link:
                problem = address_problem(link)
            else:
                problem = None if (path.parent / link).exists() else f"there is no {link}"
            if problem:
                yield f"{path.relative_to(root)}: {problem}"


CHAPTER_CHECKS = (check_pair, check_executed, check_cells, check_figures, check_exercises)


def check_all(only: list[str] | None = None, book: Path = BOOK) -> list[str]:
    """Every message of every check, for all chapters or those named."""
    messages = [message for slug in only or slugs(book) for check in CHAPTER_CHECKS for message in check(slug, book)]
    for path in sorted(book.glob("[0-9][0-9]*.ipynb")):
        if path.stem not in slugs(book):
            messages.append(f"book/{path.name} has no text book/src/{path.stem}.md. Write it, or delete the notebook.")
    for folder in ("exercises", "solutions"):
        for path in sorted((book.parent / folder).glob("*.ipynb")):
            if path.stem not in exercises.slugs(book):
                messages.append(f"{folder}/{path.name} has no source solutions/{path.stem}.py. Write it, or delete.")
    for slug in exercises.slugs(book):
        if slug not in slugs(book):
            messages.append(f"solutions/{slug}.py belongs to no chapter book/src/{slug}.md")
    return [*messages, *check_equations(book), *check_names_of_exercises(book), *check_links(book.parent)]
