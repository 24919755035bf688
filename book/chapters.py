"""From the text of a chapter (book/src/NN_slug.md) to the cells of its notebook (book/NN_slug.ipynb), unexecuted.

An appendix to chapter NN is NNa_slug.md: executed and checked as a chapter is, without numbered equations or exercises.

Where the text says "exercise 3.B", the words become a link to that notebook of exercises in Colab.

A code cell that draws states in words what its figure shows, `:alt: "…"` under its first line: the picture's alt text.
"""

import re
from pathlib import Path

import jupytext
import nbformat
from nbformat.notebooknode import NotebookNode
from notebooks import BOOK, assemble, colab_url, compare

import exercises

NAME = re.compile(r"\d\d([a-z]?)_\w+")
EXERCISE = re.compile(r"\b[Ee]xercise ((\d+)\.[A-Z])\b")


def slugs(book: Path = BOOK) -> list[str]:
    """The chapters, in order, each followed by its appendices: the stems of book/src/*.md."""
    return sorted(path.stem for path in (book / "src").glob("[0-9][0-9]*.md") if NAME.fullmatch(path.stem))


def is_appendix(slug: str) -> bool:
    return NAME.fullmatch(slug)[1] != ""


def generate(slug: str, book: Path = BOOK) -> NotebookNode:
    """The notebook of a chapter, not executed: its text's cells, the set-up cell, and the links to its exercises."""
    path = book / "src" / f"{slug}.md"
    cells = jupytext.read(path, fmt="md:myst").cells
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        raise ValueError(f"{path}: a chapter starts with a Markdown cell whose first line is its title, '# …'")

    def link(words: re.Match) -> str:
        notebook = next((each for each in slugs(book) if each.startswith(f"{int(words[2]):02}_")), None)
        return f"[{words[0]}]({colab_url(f'exercises/{notebook}.ipynb', book)})" if notebook else words[0]

    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = EXERCISE.sub(link, cell.source)
        if "alt" in cell.metadata:  # where MyST-NB looks for it
            cell.metadata["mystnb"] = {"image": {"alt": cell.metadata.pop("alt")}}
    if exercises.source(slug, book).exists():
        cells.append(nbformat.v4.new_markdown_cell(exercises.contents(slug, book)))
    return assemble(cells, book)


def read(slug: str, book: Path = BOOK) -> NotebookNode | None:
    """The committed notebook of a chapter, or None where there is none."""
    path = book / f"{slug}.ipynb"
    return nbformat.read(path, as_version=4) if path.exists() else None


def differences(slug: str, book: Path = BOOK) -> list[str]:
    """How the notebook differs from its text, outputs and execution counts apart; empty if the pair is in sync."""
    return compare(book / f"{slug}.ipynb", generate(slug, book))
