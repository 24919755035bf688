"""From solutions/NN_slug.py (jupytext's py:percent) to exercises/NN_slug.ipynb and solutions/NN_slug.ipynb, unexecuted.

The source opens with a title and a cell of imports. Each exercise is then a Markdown cell that starts

    ## Exercise 3.A: Its title
    - **Goal:** what one can do afterwards.
    - **Difficulty:** 2 of 5
    - **Time:** 15 minutes

(or "25 to 30 minutes", or "3 to 4 hours") and ends before the next. It holds code with a region `# BEGIN SOLUTION` …
`# END SOLUTION` inside a function, then code tagged `check`, Markdown tagged `hint` (two at least, each telling more
than the one before), which is put above the check wherever it stands, cells tagged `solution`, text among them, which
only the solutions show, and whatever both notebooks show. The check and the code below it are only to be run, so they
are forms in Colab. The exercises import nothing that only cells tagged `solution` use.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase

import jupytext
import nbformat
from nbformat.notebooknode import NotebookNode
from notebooks import BOOK, assemble, colab_url, compare, fold, github_url

HEADING = re.compile(r"## Exercise (\d+\.[A-Z]): (.+)")
GOAL = re.compile(r"^- \*\*Goal:\*\* (.+)$", re.MULTILINE)
DIFFICULTY = re.compile(r"^- \*\*Difficulty:\*\* ([1-5]) of 5$", re.MULTILINE)
TIME = re.compile(r"^- \*\*Time:\*\* (\d+)(?: to (\d+))? (minutes|hours)$", re.MULTILINE)
REGION = re.compile(r"^([ \t]+)# BEGIN SOLUTION\n.*?^\1# END SOLUTION$", re.MULTILINE | re.DOTALL)
# What Sphinx understands and Colab shows as it stands.
DIRECTIVE = re.compile(r"^:{3,}|^`{3,}\{|\{[a-z:]+\}`", re.MULTILINE)
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
INSTALL = "Install the library where it is missing"
RUN_ALL = """\
"Run all" stops at the first function that you have not written yet, as it should. Write it, and go on from its cell: \
*Run cell and below* in Colab's menu *Runtime*, *Run Selected Cell and All Below* in JupyterLab's menu *Run*. \
No check needs another exercise: run the two cells below and begin where you like, or skip an exercise by going on \
from the title of the next. Only a demonstration, below a check, may use what an earlier exercise made."""
KIND = {"check": "code", "hint": "markdown"}
TAGS = {"check", "hint", "solution", "nbval-ignore-output", "hide-input"}


class ExerciseError(ValueError):
    """A source that would give an incomplete exercise."""


@dataclass
class Exercise:
    """One exercise, as its source has it.

    Attributes:
        number: such as "3.A"; the chapter's own boxes are numbered 3.1, 3.2, …
        title: without the number.
        goal: one sentence.
        difficulty: 1 to 5.
        minutes: the expected time, from and to.
        cells: all its cells, with the solution.
    """

    number: str
    title: str
    goal: str
    difficulty: int
    minutes: tuple[int, int]
    cells: list[NotebookNode]

    @property
    def functions(self) -> list[str]:
        """The names of the functions that the reader writes."""
        code = [cell.source for cell in self.cells if REGION.search(cell.source)]
        return [holder(text, match.start()) for text in code for match in REGION.finditer(text)]


def source(slug: str, book: Path = BOOK) -> Path:
    return book.parent / "solutions" / f"{slug}.py"


def slugs(book: Path = BOOK) -> list[str]:
    """The chapters that have exercises, in order."""
    return sorted(path.stem for path in source("x", book).parent.glob("[0-9][0-9]_*.py"))


def paths(slug: str, book: Path = BOOK) -> tuple[Path, Path]:
    """The notebook of exercises and that of solutions."""
    return book.parent / "exercises" / f"{slug}.ipynb", book.parent / "solutions" / f"{slug}.ipynb"


def read(slug: str, book: Path = BOOK) -> tuple[list[NotebookNode], list[Exercise]]:
    """What stands before the first exercise, and the exercises.

    Raises:
        ExerciseError: an exercise lacks something, or holds what Colab could not show.
    """
    cells = jupytext.read(source(slug, book), fmt="py:percent").cells
    starts = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    where = f"solutions/{slug}.py"
    opening = cells[: starts[0]] if starts else cells
    if [cell.cell_type for cell in opening] != ["markdown", "code"] or not opening[0].source.startswith("# "):
        raise ExerciseError(f"{where}: it starts with a Markdown cell, '# …', and one cell of imports")
    exercises, used = [], names(opening[1].source)
    for letter, start, end in zip(ascii_uppercase, starts, [*starts[1:], len(cells)], strict=False):
        number = f"{int(slug[:2])}.{letter}"
        exercises.append(parse(number, cells[start:end], f"{where}, Exercise {number}"))
    for easier, harder in pairwise(exercises):
        if easier.difficulty > harder.difficulty:
            raise ExerciseError(
                f"{where}: Exercise {easier.number} is harder than {harder.number}; order by difficulty"
            )
    for exercise in exercises:
        used |= {name for cell in exercise.cells if cell.cell_type == "code" for name in names(cell.source)}
    if unused := imported(opening[1].source) - used:
        raise ExerciseError(f"{where}: no cell uses {', '.join(sorted(unused))}, which the first imports")
    return opening, exercises


def parse(number: str, cells: list[NotebookNode], where: str) -> Exercise:
    heading = HEADING.match(cells[0].source)
    if not heading or heading[1] != number:
        raise ExerciseError(f"{where} is missing: '## Exercise {number}: …' expected, got {cells[0].source[:40]!r}")
    found = {name: pattern.search(cells[0].source) for name, pattern in PARTS.items()}
    missing = [name for name, match in found.items() if not match]
    if not any(is_a("check", cell) for cell in cells):
        missing.append("a code cell tagged check")
    if not any(is_a("solution", cell) and cell.cell_type == "markdown" for cell in cells):
        missing.append("text tagged solution")
    if sum(is_a("hint", cell) for cell in cells) < 2:
        missing.append("two hints")
    checks = [i for i, cell in enumerate(cells) if is_a("check", cell)]
    answers = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and REGION.search(cell.source)]
    if checks and answers and checks[0] < answers[0]:
        missing.append("a function above its check")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    regions = [(text, match.start()) for text in code for match in REGION.finditer(text)]
    if not regions:
        missing.append("a region '# BEGIN SOLUTION' … '# END SOLUTION' inside a function")
    if missing:
        raise ExerciseError(f"{where} lacks {', '.join(missing)}")
    for text, position in regions:
        if holder(text, position) is None:
            raise ExerciseError(f"{where}: a solution stands inside a function, so that its check can call the stub")
    for text in code:
        if "SOLUTION" in REGION.sub("", text):
            raise ExerciseError(f"{where}: '# BEGIN SOLUTION' and '# END SOLUTION' come in pairs, equally indented")
    for cell in cells:
        if unknown := set(cell.metadata.get("tags", [])) - TAGS:
            raise ExerciseError(f"{where}: unknown tag {sorted(unknown)[0]!r}; known: {', '.join(sorted(TAGS))}")
        if cell.cell_type == "markdown" and (directive := DIRECTIVE.search(cell.source)):
            raise ExerciseError(f"{where}: {directive[0]!r} does not render in Colab; write plain Markdown")
    low, high, unit = found["a time"].groups()
    minutes = [int(value) * (60 if unit == "hours" else 1) for value in (low, high or low)]
    if minutes[0] > minutes[1]:
        raise ExerciseError(f"{where}: a time of {low} to {high} {unit} runs backwards")
    return Exercise(number, heading[2], found["a goal"][1], int(found["a difficulty"][1]), tuple(minutes), cells)


PARTS = {"a goal": GOAL, "a difficulty": DIFFICULTY, "a time": TIME}


def is_a(tag: str, cell: NotebookNode) -> bool:
    return tag in cell.metadata.get("tags", []) and cell.cell_type == KIND.get(tag, cell.cell_type)


def holder(code: str, position: int) -> str | None:
    """The outermost function in which a position of the code stands."""
    line = code[:position].count("\n") + 1
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and node.lineno < line <= node.end_lineno:
            return node.name
    return None


def generate(slug: str, book: Path = BOOK) -> tuple[NotebookNode, NotebookNode]:
    """The notebook of exercises and that of solutions, neither executed."""
    (title, imports), exercises = read(slug, book)
    to_do = [plain(title, introduction(slug, title, book, "exercises"))]
    to_do.append(plain(imports, imports_for_reader(imports.source, exercises)))
    done = [plain(title, introduction(slug, title, book, "solutions")), plain(imports, imports.source)]
    for cells in (to_do, done):
        fold(cells[1], "Imports")
    for exercise in exercises:
        to_do += for_reader(exercise)
        done += without_hints(exercise, without_markers)
    return assemble(to_do, book, INSTALL), assemble(done, book, INSTALL)


def introduction(slug: str, cell: NotebookNode, book: Path, folder: str) -> str:
    """A badge under the title, the text of the source, links to the other notebooks, and how to run this one."""
    title, _, text = cell.source.partition("\n")
    badge = f"[![Open in Colab]({BADGE})]({colab_url(f'{folder}/{slug}.ipynb', book)})"
    chapter, exercise, solution = (f"{folder}/{slug}.ipynb" for folder in ("book", "exercises", "solutions"))
    links = (
        f"[chapter]({github_url(chapter, book)}) · "
        f"exercises [here]({github_url(exercise, book)}) or [in Colab]({colab_url(exercise, book)}) · "
        f"solutions [here]({github_url(solution, book)}) or [in Colab]({colab_url(solution, book)})"
    )
    parts = [title, badge, text.strip(), links, *([RUN_ALL] if folder == "exercises" else [])]
    return "\n\n".join(part for part in parts if part)


def imported(code: str) -> set[str]:
    """The names that the import statements of a cell define."""
    nodes = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {bound(alias) for node in nodes for alias in node.names}


def bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def names(code: str) -> set[str]:
    """The names that a piece of code uses."""
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def imports_for_reader(code: str, exercises: list[Exercise]) -> str:
    """The cell of imports, without those that only cells tagged `solution` use; tools of the answers stay."""
    cells = [cell for exercise in exercises for cell in exercise.cells]
    shown = [cell.source for cell in cells if cell.cell_type == "code" and not is_a("solution", cell)]
    used, lines = set().union(*map(names, [code, *shown])), code.split("\n")
    for node in reversed(ast.parse(code).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [alias for alias in node.names if bound(alias) in used]
            if len(kept) < len(node.names):
                node.names = kept
                lines[node.lineno - 1 : node.end_lineno] = [ast.unparse(node)] if kept else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def for_reader(exercise: Exercise) -> list[NotebookNode]:
    """The cells with stubs in the place of solutions; the hints, folded, stand above the check."""
    hints = [cell.source for cell in exercise.cells if is_a("hint", cell)]
    folded = [
        nbformat.v4.new_markdown_cell(
            f"<details><summary>Hint {i} of {len(hints)}</summary>\n\n{hint}\n\n</details>",
            metadata={"tags": ["hint"]},
        )
        for i, hint in enumerate(hints, 1)
    ]
    cells = without_hints(exercise, lambda text: REGION.sub(lambda match: match[1] + stub(exercise.number), text))
    cells = [cell for cell in cells if not is_a("solution", cell)]
    check = next(i for i, cell in enumerate(cells) if is_a("check", cell))
    return [*cells[:check], *folded, *cells[check:]]


def without_hints(exercise: Exercise, change: Callable[[str], str]) -> list[NotebookNode]:
    """The cells but hints, each text changed; checks, and what demonstrates an answer below one, are forms."""
    cells, checked = [], False
    for cell in exercise.cells:
        if is_a("hint", cell):
            continue
        cells.append(plain(cell, change(cell.source)))
        if is_a("check", cell):
            checked = True
            fold(cells[-1], f"Check of {exercise.number}")
        elif checked and cell.cell_type == "code" and not is_a("solution", cell) and not REGION.search(cell.source):
            fold(cells[-1], f"Demonstration for {exercise.number}")
    return cells


def stub(number: str) -> str:
    return f'raise NotImplementedError("Exercise {number} is yours to write")'


def plain(cell: NotebookNode, text: str) -> NotebookNode:
    new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
    return new(text, metadata=dict(cell.metadata))


def without_markers(code: str) -> str:
    return re.sub(r"^[ \t]+# (BEGIN|END) SOLUTION\n?", "", code, flags=re.MULTILINE).rstrip()


def table(exercises: list[Exercise]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [f"| {e.number} {e.title} | {e.goal} | {e.difficulty} of 5 | {span(e.minutes)} |" for e in exercises]
    return ["| exercise | you will | difficulty | minutes |", "|---|---|---|--:|", *rows]


def span(bounds: tuple[int, int]) -> str:
    return "–".join(map(str, dict.fromkeys(bounds)))


def together(exercises: list[Exercise]) -> str:
    """How long a chapter's exercises take; from three hours on, in hours."""
    low, high = (sum(exercise.minutes[i] for exercise in exercises) for i in (0, 1))
    if high < 180:
        return f"{span((low, high))} minutes"
    return f"{span((round(low / 60), round(high / 60)))} hours"


def contents(slug: str, book: Path = BOOK) -> str:
    """What closes a chapter: a table of its exercises, and links to both notebooks."""
    _, exercises = read(slug, book)
    links = [
        f"**{name}**: [read]({github_url(path, book)}), [![Open in Colab](_static/colab.svg)]({colab_url(path, book)})"
        for name, path in [("Exercises", f"exercises/{slug}.ipynb"), ("Solutions", f"solutions/{slug}.ipynb")]
    ]
    return "\n".join(
        [
            "### In code, graded on the spot",
            "",
            f"About {together(exercises)} in a notebook that needs nothing but itself. Each exercise has hints, and a "
            "check that compares your function with one computed in another way and says what is likely to be wrong.",
            "",
            *table(exercises),
            "",
            f"{links[0]} · {links[1]}",
        ]
    )


def differences(slug: str, book: Path = BOOK) -> list[str]:
    """How the two notebooks differ from what their source gives, outputs apart; empty if they are in sync."""
    pairs = zip(paths(slug, book), generate(slug, book), strict=True)
    return [f"{path.parent.name}/: {found}" for path, notebook in pairs for found in compare(path, notebook)]
