"""Exercises: the stub fails, the solution passes, wrong answers are told what is wrong; the generator refuses gaps."""

import ast
import copy
import math
import re
import runpy
import shutil
from fractions import Fraction
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import chapters
import check_chapters
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import sync
import torch
from notebooks import BOOK, ROOT

import exercises
from cratelab.checks import experiment, hunting
from cratelab.checks.grading import CheckFailed, NotWritten, call, grade, number, predict, random

SOURCES = {slug: exercises.read(slug) for slug in exercises.slugs()}
WRONG = {slug: runpy.run_path(str(ROOT / "tests/wrong_answers" / f"{slug}.py"))["WRONG"] for slug in SOURCES}
ALL = [(slug, exercise) for slug, (_, list_) in SOURCES.items() for exercise in list_]
each_exercise = pytest.mark.parametrize(("slug", "exercise"), ALL, ids=lambda x: getattr(x, "number", ""))


@pytest.fixture(autouse=True)
def _as_in_a_notebook(monkeypatch):
    """What a notebook's first cell sets, undone afterwards; figures are not shown."""
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_device(None)  # "cpu" would cost each call of torch a detour through Python
    with plt.rc_context():
        yield
    torch.set_default_dtype(dtype)
    if device.type != "cpu":
        torch.set_default_device(device)


def run(slug: str, exercise: exercises.Exercise, answer=None) -> dict:
    """Execute an exercise's cells up to its last check, with `answer` in the place of the last function asked for.

    Of what `wrong_answers.asked` says: `answer` may stand in the place of another function, and be given reasons.
    """
    names = {}
    exec(SOURCES[slug][0][1].source, names)
    code = [cell for cell in exercise.cells if cell.cell_type == "code"]
    last = max(i for i, cell in enumerate(code) if exercises.is_a("check", cell))
    for cell in code[: last + 1]:
        source = cell.source
        if getattr(answer, "reasons", False) and exercises.is_a("check", cell):
            source = source.replace(f"({exercise.functions[-1]})", f"({exercise.functions[-1]}, reasons=True)")
        exec(compile(source, f"Exercise {exercise.number}", "exec"), names)
        if answer and exercises.REGION.search(cell.source):
            answer.__name__ = getattr(answer, "replaces", exercise.functions[-1])
            names[answer.__name__] = answer
    return names


def is_an_experiment(exercise: exercises.Exercise) -> bool:
    """Whether its check is `conduct`: seconds of training, which the run of the notebook does once (test_colab.py)."""
    return any("conduct(" in cell.source for cell in exercise.cells)


@each_exercise
def test_solution_passes(slug, exercise, capsys):
    if is_an_experiment(exercise):
        pytest.skip("an experiment: its notebook is run from the wheel, and prints what it should")
    run(slug, exercise)
    assert capsys.readouterr().out, "a check that passes says so"


@each_exercise
def test_stub_fails_and_names_the_exercise(slug, exercise):
    to_do = [cell for cell in exercises.for_reader(exercise) if cell.cell_type == "code"]
    names = {}
    exec(SOURCES[slug][0][1].source, names)
    with pytest.raises(NotImplementedError, match=f"Exercise {exercise.number} "):
        for cell in to_do:
            exec(cell.source, names)


WRONG_ANSWERS = [
    pytest.param(slug, exercise, message, answer, id=f"{exercise.number}-{message}")
    for slug, exercise in ALL
    for message, answer in WRONG[slug].get(exercise.number, {}).items()
]


@pytest.mark.parametrize(("slug", "exercise", "message", "answer"), WRONG_ANSWERS)
def test_wrong_answer_is_told_what_is_wrong(slug, exercise, message, answer):
    with pytest.raises(CheckFailed, match=message):
        run(slug, exercise, answer)


def with_nan(answer):
    """The same answer with NaN for every number that is no integer."""
    if isinstance(answer, torch.Tensor | np.ndarray):
        answer = torch.as_tensor(answer)
        return torch.full_like(answer, torch.nan) if answer.is_floating_point() else answer
    if isinstance(answer, dict):
        return {key: with_nan(value) for key, value in answer.items()}
    if isinstance(answer, tuple | list):
        return type(answer)(with_nan(value) for value in answer)
    return math.nan if isinstance(answer, float) else answer


@each_exercise
def test_nan_is_never_right(slug, exercise):
    if is_an_experiment(exercise):
        pytest.skip("an experiment, of which test_conduct_of_an_experiment tries it")
    right = run(slug, exercise)[exercise.functions[-1]]
    changed = []

    def answer(*arguments, **options):
        given = right(*arguments, **options)
        changed.append(repr(with_nan(given)) != repr(given))
        return with_nan(given)

    try:
        run(slug, exercise, answer)
    except Exception:
        return
    assert not any(changed)


def raising(right, at: int, calls: list):
    """`right`, which notes its calls and raises an error at one of them, counted from 1."""

    @wraps(right)
    def answer(*arguments):
        calls.append(right.__name__)
        if len(calls) == at:
            raise IndexError("of the reader")
        return right(*arguments)

    answer.replaces = right.__name__
    return answer


@each_exercise
def test_an_error_of_the_reader_is_a_sentence(slug, exercise):
    """In each function asked for, at its first call and at its last."""
    if is_an_experiment(exercise):
        pytest.skip("an experiment: each call trains; what asks it is tried below")
    names = run(slug, exercise)
    for right in [names[name] for name in exercise.functions]:
        run(slug, exercise, raising(right, 0, calls := []))
        for at in {1, len(calls)}:
            with pytest.raises(CheckFailed, match=r"raises IndexError.*, where .* expected: of the reader"):
                run(slug, exercise, raising(right, at, []))


def of_kind(answer, kind):
    """The same answer with `kind` of every tensor, array and number in it."""
    if isinstance(answer, dict):
        return {key: of_kind(value, kind) for key, value in answer.items()}
    if isinstance(answer, tuple | list):
        return type(answer)(of_kind(value, kind) for value in answer)
    return answer if isinstance(answer, str) else kind(torch.as_tensor(answer).detach())


def without_torch(right, kind):
    """`right` as one writes it who turns each tensor into an array of NumPy, and returns `kind`."""

    @wraps(right)
    def answer(*arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                np.asarray(argument)  # an error where gradients are kept
        return of_kind(right(*arguments), kind)

    return answer


def numbers(tensor):
    """Python's numbers, in lists; an array where there are so many that lists take seconds."""
    return tensor.tolist() if tensor.numel() < 10_000 else tensor.numpy()


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, numbers], ids=["arrays", "numbers"])
@pytest.mark.parametrize("slug", [slug for slug in SOURCES if slug < "08"])
def test_demonstrations_take_what_their_checks_take(slug, kind):
    """Each chapter's cells in their order, as its reader has them; all answers are of one kind."""
    names = {}
    exec(SOURCES[slug][0][1].source, names)
    for exercise in SOURCES[slug][1]:
        if is_an_experiment(exercise):
            continue
        asked = exercise.functions[-1]
        for cell in exercise.cells:
            if cell.cell_type != "code" or exercises.is_a("solution", cell):
                continue
            try:
                exec(cell.source, names)
            except CheckFailed:
                assert exercise.number in {"4.D", "5.C"}, "only these ask for gradients, which arrays do not keep"
                names[asked] = names[asked].__wrapped__
                exec(cell.source, names)
            if exercises.REGION.search(cell.source) and asked in names:
                names[asked] = without_torch(names[asked], kind)


@each_exercise
def test_at_least_four_wrong_answers_were_tried(slug, exercise):
    assert len(WRONG[slug].get(exercise.number, {})) >= 4, f"tests/wrong_answers/{slug}.py needs more for this exercise"


@pytest.mark.parametrize("slug", SOURCES)
def test_three_to_six_exercises_a_chapter(slug):
    assert 3 <= len(SOURCES[slug][1]) <= 6
    assert set(WRONG[slug]) == {exercise.number for exercise in SOURCES[slug][1]}


def test_exercises_that_teachers_are_told_of_exist():
    named = set(re.findall(r"\b\d+\.[A-F]\b", (BOOK / "teaching.md").read_text(encoding="utf8")))
    assert len(named) > 20 and named <= {exercise.number for _, exercise in ALL}


@pytest.mark.parametrize("slug", SOURCES)
def test_exercises_hold_no_solution_and_hints_are_folded(slug):
    to_do, done = exercises.generate(slug)
    assert not any("SOLUTION" in cell.source for notebook in (to_do, done) for cell in notebook.cells)
    shown = "\n".join(cell.source for cell in to_do.cells)
    for exercise in SOURCES[slug][1]:
        answers = [match[0] for cell in exercise.cells for match in exercises.REGION.finditer(cell.source)]
        lines = [line.strip() for answer in answers for line in answer.splitlines()[1:-1]]
        assert not all(line in shown for line in lines), f"Exercise {exercise.number} gives its solution away"
        assert not [cell for cell in exercise.cells if exercises.is_a("solution", cell) and cell.source in shown]
    hints = [cell.source for cell in to_do.cells if "<summary>Hint" in cell.source]
    assert len(hints) >= 2 * len(SOURCES[slug][1])
    assert all(hint.startswith("<details><summary>") and hint.endswith("</details>") for hint in hints)


@pytest.mark.parametrize("slug", SOURCES)
def test_exercises_are_in_the_order_of_work_and_what_is_only_run_is_folded(slug):
    """Function, hints, check, demonstrations; in Colab, code from the check on is folded, and none before it.

    A bug hunt goes through it twice: first inputs, then the function, which is not folded either.
    """
    order = "stub", "hint", "check", "demonstration"
    for exercise in SOURCES[slug][1]:
        kinds, rounds = [], []
        for cell in exercises.for_reader(exercise):
            form = cell.metadata.get("cellView") == "form"
            assert form == cell.source.startswith("#@title ")
            if "NotImplementedError" in cell.source:
                if "check" in kinds:
                    rounds, kinds = [*rounds, kinds], []
                kinds.append("stub")
            elif cell.source.startswith("<details>"):
                kinds.append("hint")
            elif cell.source.startswith(f"#@title Check of {exercise.number}\n"):
                kinds.append("check")
            elif cell.cell_type == "code" and "check" in kinds:
                kinds.append("demonstration")
            assert form == (cell.cell_type == "code" and "check" in kinds)
        assert all(each == sorted(each, key=order.index) for each in [*rounds, kinds])
        assert {*kinds}.union(*rounds) >= {*order[:3]} and "check" in kinds


@pytest.mark.parametrize("slug", SOURCES)
def test_exercises_import_what_their_reader_uses(slug):
    """Names in any code but that of cells tagged solution; the answers are the reader's to write."""
    code = exercises.generate(slug)[0].cells[2].source
    cells = [cell for exercise in SOURCES[slug][1] for cell in exercise.cells if cell.cell_type == "code"]
    theirs = [code, *(cell.source for cell in cells if not exercises.is_a("solution", cell))]
    tree = ast.walk(ast.parse("\n".join(theirs)))
    loaded = {node.id for node in tree if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    aliases = [node.names for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.asname or alias.name for names in aliases for alias in names} <= loaded


# The generator, on one small exercise.

SAMPLE = '''\
# %% [markdown]
# # Exercises to a chapter
#
# Write functions.

# %%
import math
from fractions import Decimal, Fraction

import torch

# %% [markdown]
# ## Exercise 1.A: Twice
#
# - **Goal:** double.
# - **Difficulty:** 2 of 5
# - **Time:** 5 minutes

# %%
def twice(x):
    """2x"""
    # BEGIN SOLUTION
    return 2 * x
    # END SOLUTION


# %% tags=["check"]
assert twice(torch.tensor(2)) == 4
print("right")

# %%
print(twice(Fraction(1, 4)))

# %% [markdown] tags=["hint"]
# Add.

# %% [markdown] tags=["hint"]
# Or multiply.

# %% [markdown] tags=["solution"]
# Doubling is adding.

# %% tags=["solution"]
print(math.floor(Decimal(2.5)))
'''
LAST = "print(math.floor(Decimal(2.5)))\n"
SECOND = SAMPLE[SAMPLE.index("# %% [markdown]\n# ## ") :].replace("1.A", "1.B")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A book of one chapter without code, and its exercise, with all notebooks."""
    root = tmp_path_factory.mktemp("sample")
    (root / "book" / "src").mkdir(parents=True)
    (root / "solutions").mkdir()
    shutil.copy(BOOK / "_config.yml", root / "book")
    (root / "book" / "src" / "01_sample.md").write_text("# A chapter\n\n+++\n\n## Exercises\n\nTry.\n")
    (root / "solutions" / "01_sample.py").write_text(SAMPLE)
    sync.update_exercises("01_sample", root / "book")
    nbformat.write(chapters.generate("01_sample", root / "book"), root / "book" / "01_sample.ipynb")
    return root


@pytest.fixture
def book(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy")) / "book"


def rewrite(book: Path, old: str, new: str) -> None:
    path = exercises.source("01_sample", book)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("# # Exercises", "# Exercises", "starts with a Markdown cell"),
        ("# %%\nimport math\nfrom fractions import Decimal, Fraction\n\nimport torch\n", "", "one cell of imports"),
        ("import math\n", "import math, cmath as other\n", "no cell uses other, which the first imports"),
        ("import math\n", "from math import e, pi\nimport math\n", "no cell uses e, pi, which the first imports"),
        ("# %%\ndef twice", '# %% tags=["check"]\ntwice\n\n# %%\ndef twice', "lacks a function above its check"),
        ("Exercise 1.A:", "Exercise 2.A:", "'## Exercise 1.A: …' expected"),
        ("# - **Goal:** double.\n", "", "lacks a goal"),
        ("2 of 5", "6 of 5", "lacks a difficulty"),
        ("5 minutes", "some minutes", "lacks a time"),
        ("5 minutes", "5 days", "lacks a time"),
        ("5 minutes", "5 to 4 minutes", "5 to 4 minutes runs backwards"),
        (' tags=["check"]', "", "lacks a code cell tagged check"),
        ('# %% [markdown] tags=["hint"]\n# Add.\n', "", "lacks two hints"),
        ('tags=["solution"]', "", "lacks text tagged solution"),
        ("# BEGIN SOLUTION", "# BEGIN", "lacks a region"),
        ("    # END SOLUTION", "  # END SOLUTION", "lacks a region"),
        ("    # END SOLUTION", "    # END SOLUTION\n    # END SOLUTION", "come in pairs"),
        ("def twice(x):", "if x := 1:", "inside a function"),
        ('tags=["check"]', 'tags=["check", "chekc"]', "unknown tag 'chekc'"),
        ("# Add.", "# ```{note}\n# Add.\n# ```", "does not render in Colab"),
        ("# Add.", "# See {eq}`eq-01-1`.", "does not render in Colab"),
        (LAST, f"{LAST}\n{SECOND.replace('2 of 5', '1 of 5')}", "order by difficulty"),
        (LAST, f"{LAST}\n{SECOND.replace('1.B', '1.A')}", "'## Exercise 1.B: …' expected"),
    ],
)
def test_incomplete_exercise_is_refused(book, old, new, complaint):
    rewrite(book, old, new)
    with pytest.raises(exercises.ExerciseError, match=re.escape(complaint)):
        exercises.generate("01_sample", book)


def test_both_notebooks_are_remade_byte_for_byte(book):
    first = [path.read_bytes() for path in exercises.paths("01_sample", book)]
    assert list(check_chapters.check_exercises("01_sample", book)) == []
    sync.update_exercises("01_sample", book)
    assert [path.read_bytes() for path in exercises.paths("01_sample", book)] == first
    to_do, done = (nbformat.reads(text.decode(), as_version=4) for text in first)
    assert to_do.cells[4].source == f'def twice(x):\n    """2x"""\n    {exercises.stub("1.A")}'
    assert done.cells[4].source == 'def twice(x):\n    """2x"""\n    return 2 * x'
    assert "find_spec" in to_do.cells[1].source and "find_spec" in done.cells[1].source
    assert done.cells[5].outputs[0].text == "right\n"
    assert to_do.cells[2].source == "#@title Imports\nfrom fractions import Fraction\n\nimport torch"
    assert done.cells[2].source.startswith("#@title Imports\nimport math\nfrom fractions import Decimal, Fraction\n")
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/"
    for folder, notebook in [("exercises", to_do), ("solutions", done)]:
        line = notebook.cells[0].source.split("\n")[2]
        assert line.startswith(badge) and line.endswith(f"/{folder}/01_sample.ipynb)")
        links = re.findall(
            r"(exercises|solutions) \[here\]\((\S+)\) or \[in Colab\]\((\S+)\)", notebook.cells[0].source
        )
        assert [name for name, *_ in links] == ["exercises", "solutions"]
        assert all(url.endswith(f"/{name}/01_sample.ipynb") for name, *urls in links for url in urls)
    assert [('"Run all" stops' in notebook.cells[0].source) for notebook in (to_do, done)] == [True, False]
    for menu in "*Run cell and below* in Colab's menu *Runtime*", "*Run Selected Cell and All Below* in JupyterLab's":
        assert menu in to_do.cells[0].source.partition("go on from its cell: ")[2]
    folded = "Install the library where it is missing", "Imports", "Check of 1.A", "Demonstration for 1.A"
    for notebook in (to_do, done):
        titled = [cell.source.split("\n")[0] for cell in notebook.cells if cell.source.startswith("#@title ")]
        assert titled == [f"#@title {title}" for title in folded]
        forms = [cell.source.split("\n")[0] for cell in notebook.cells if cell.metadata.get("cellView") == "form"]
        assert forms == titled
    closing = nbformat.read(book / "01_sample.ipynb", as_version=4).cells[-1].source
    assert "| 1.A Twice | double. | 2 of 5 | 5 |" in closing
    assert closing.count("colab.research.google.com/github/") == 2
    for name in ("Exercises", "Solutions"):
        (line,) = re.findall(rf"\*\*{name}\*\*: \S+\((\S+)\), \[.*?\]\((https\S+)\)", closing)
        assert all(url.endswith(f"/{name.lower()}/01_sample.ipynb") for url in line)


@pytest.mark.parametrize(
    ("bounds", "cell", "total"),
    [
        ("25 to 30 minutes", "25–30", "About 25–30 minutes"),
        ("170 minutes", "170", "About 170 minutes"),
        ("180 minutes", "180", "About 3 hours"),
        ("3 to 4 hours", "180–240", "About 3–4 hours"),
        ("190 to 200 minutes", "190–200", "About 3 hours"),
    ],
)
def test_time_is_a_number_or_a_span(book, bounds, cell, total):
    rewrite(book, "5 minutes", bounds)
    closing = exercises.contents("01_sample", book)
    assert f"| 2 of 5 | {cell} |" in closing and total in closing


def test_times_of_a_chapter_are_added(book):
    rewrite(book, LAST, f"{LAST}\n{SECOND.replace('5 minutes', '10 to 20 minutes')}")
    assert "About 15–25 minutes" in exercises.contents("01_sample", book)


@pytest.mark.parametrize("above", ["# %%\ndef twice", '# %% tags=["check"]', "# %%\nprint(twice"])
def test_hints_stand_above_the_check_wherever_the_source_has_them(book, above):
    hints = SAMPLE[SAMPLE.index('# %% [markdown] tags=["hint"]') : SAMPLE.index('# %% [markdown] tags=["solution"]')]
    before = exercises.paths("01_sample", book)[0].read_text()
    rewrite(book, hints, "")
    rewrite(book, above, hints + above)
    sync.update_exercises("01_sample", book, again=False)
    assert exercises.paths("01_sample", book)[0].read_text() == before


def test_form_or_its_title_is_no_change_of_code(book, monkeypatch):
    before = [path.read_bytes() for path in exercises.paths("01_sample", book)]
    monkeypatch.setattr(exercises, "INSTALL", "")
    assert sync.update_exercises("01_sample", book, again=False) is None
    assert "#@title Install" not in exercises.paths("01_sample", book)[1].read_text()
    monkeypatch.undo()
    assert sync.update_exercises("01_sample", book, again=False) is None
    assert [path.read_bytes() for path in exercises.paths("01_sample", book)] == before


def test_failing_solution_leaves_both_notebooks(book):
    before = [path.read_bytes() for path in exercises.paths("01_sample", book)]
    rewrite(book, "return 2 * x", "return 3 * x")
    with pytest.raises(sync.ChapterError, match=r"solutions/01_sample\.py, code cell 4 failed"):
        sync.update_exercises("01_sample", book)
    assert [path.read_bytes() for path in exercises.paths("01_sample", book)] == before


@pytest.mark.parametrize(
    ("folder", "change", "complaint"),
    [
        ("exercises", {"source": "0"}, "exercises/: cell 6 differs in source"),
        ("solutions", {"source": "0"}, "solutions/: cell 6 differs in source"),
        ("exercises", {"id": "0"}, "exercises/: cell 6 differs in id"),
        ("solutions", {"id": "0"}, "solutions/: cell 6 differs in id"),
        ("exercises", {"metadata": {}}, "differs in metadata"),
        ("solutions", {"execution_count": None}, "execution counts are"),
        (
            "exercises",
            {"outputs": [nbformat.v4.new_output("stream", text="no")]},
            "exercises/01_sample.ipynb has outputs",
        ),
    ],
)
def test_notebook_out_of_sync_is_noticed(book, folder, change, complaint):
    path = book.parent / folder / "01_sample.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[5].update(change)
    nbformat.write(notebook, path)
    (message,) = check_chapters.check_exercises("01_sample", book)
    assert complaint in message


def test_missing_notebook_is_noticed(book):
    exercises.paths("01_sample", book)[0].unlink()
    (message,) = check_chapters.check_exercises("01_sample", book)
    assert "exercises/01_sample.ipynb does not exist" in message


def test_chapter_without_a_section_for_exercises_is_noticed(book):
    (book / "src" / "01_sample.md").write_text("# A chapter\n")
    (message,) = check_chapters.check_exercises("01_sample", book)
    assert "'## Exercises'" in message


def test_notebook_without_a_source_is_noticed(book):
    exercises.source("01_sample", book).unlink()
    found = [message for message in check_chapters.check_all(["01_sample"], book) if "has no source" in message]
    assert len(found) == 2


def test_source_without_a_chapter_is_noticed(book):
    exercises.source("01_sample", book).rename(exercises.source("02_other", book))
    assert "solutions/02_other.py belongs to no chapter book/src/02_other.md" in check_chapters.check_all([], book)


# Hunts and predictions.


def polynomial(a, b, c, **bugs):
    return sum(3 * x if bug in bugs else x for bug, x in [("first", a), ("second", b), ("third", c)])


def hunt(*cases, **options):
    bugs = {f"the {key}": {key: True} for key in ("first", "second", "third")}
    needs = {key: ("a number, 0 or more", lambda x: x >= 0) for key in "abc"}
    hunting.hunt(lambda: cases, polynomial, bugs, needs, **options)


def test_a_hunt_names_what_is_exposed_in_any_order(capsys):
    hunt((1, 1, 1), (0, 1, 0), (0, 1, 1))
    assert re.search("3 of 3 bugs exposed.*1: the first.*2: the second.*3: the third", capsys.readouterr().out, re.S)
    with pytest.raises(CheckFailed) as verdict:
        hunt((1, 1, 1), (0, 1, 0), (0, 0, 0))
    assert "1 of 3 bugs exposed" in str(verdict.value) and "the second" in str(verdict.value)
    assert "input 3 shows no bug" in str(verdict.value) and "input 1 shows several" in str(verdict.value)
    assert "the first" not in str(verdict.value) and "the third" not in str(verdict.value)


@pytest.mark.parametrize(
    ("cases", "complaint"),
    [
        ([(1, 1, 1)] * 7, "7 inputs; 6 are enough"),
        ([(1, 1)], "2 arguments; 3 are needed: a, b, c"),
        ([(1, 1, -1)], "c is -1; a number, 0 or more is needed"),
        ([(1, 1, "1")], "c: a number is needed"),
        ([(1, 1, math.inf)], "the right answer is not finite"),
        ([(1, 1, math.nan)], "c is nan"),
        ([[1, 1, 1]], "a list of inputs, each a tuple"),
        ([], "a list of inputs"),
    ],
)
def test_what_is_no_input_is_refused(cases, complaint):
    with pytest.raises(CheckFailed, match=complaint):
        hunt(*cases)


def test_predictions_are_counted_before_they_are_explained(capsys):
    wrong, why = {"a": ": because", "b": None}, {"a": "one", "b": "two"}
    with pytest.raises(CheckFailed, match="1 of 2 right") as verdict:
        hunting.judge(summed, wrong, why=why)
    assert "because" not in str(verdict.value)
    with pytest.raises(CheckFailed, match="a: because"):
        hunting.judge(summed, wrong, reasons=True, why=why)
    assert not capsys.readouterr().out
    hunting.judge(summed, dict.fromkeys("ab"), why=why)
    assert capsys.readouterr().out == "a: one\nb: two\n"


# The core of the checks.


def summed(x):
    return x.sum()


def graded(function) -> None:
    cases = [(random(3, 4, seed=0),), (random(5, 2, seed=1),)]
    grade(function, cases, lambda x: 2 * x, "doubling", {"halved": lambda x: x / 2, "shape": summed})


def changed_in_place(x):
    x *= 2
    return x


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda x: None, "does it end in `return`"),
        (lambda x: "two", "returns a str"),
        (lambda x: [["a"]], "returns a list"),
        (lambda x: {"a": 1}, "returns a dict"),
        (lambda x: 2 * x + 0j, "returns a Tensor of shape .* and torch.complex"),
        (lambda x: [[1], [1, 2]], "returns a list"),
        (lambda x: (2 * x).numpy().astype(str), "returns a ndarray of shape .* and <U"),
        (lambda x: np.full(x.shape, None), "not finite"),
        (lambda x: (2 * x).numpy().astype(object) * 1j, "returns a ndarray"),
        (lambda x: (2 * x.float() + 99) - 99, "to single precision only"),
        (lambda x: 2 * x.T, "is it transposed"),
        (summed, r"the shape \(\) for x of shape \(3, 4\); \(3, 4\) was expected"),
        (lambda x: x / 0, "not finite"),
        (lambda x: 2 * x + torch.nan, "not finite"),
        (lambda x: torch.where(x == x.max(), torch.nan, 2 * x), "not finite"),
        (changed_in_place, "in place"),
        (lambda x: x.resize_(x.numel()).view(x.shape), "in place"),
        (lambda x: x / 2, "halved$"),
        (lambda x: 3 * x, r"gives .* where .* is right \(entry \d+ of \d+\)\. No common mistake"),
        (lambda x: 2 * x + (len(x) == 5) * 1e-5, r"for x of shape \(5, 2\) it gives"),
    ],
)
def test_answer_is_described(answer, complaint):
    with pytest.raises(CheckFailed, match=complaint):
        graded(answer)


def test_missing_values_and_lists_are_fine_as_arguments():
    case = (torch.tensor([1.0, torch.nan]), ["a"])
    grade(lambda x, names: x.nan_to_num(0), [case], lambda x, names: x.nan_to_num(0), "zeros", {})
    with pytest.raises(CheckFailed, match=r"returns numbers that are not finite for x of shape \(2,\)"):
        grade(lambda x, names: x, [case], lambda x, names: x.nan_to_num(0), "zeros", {})
    with pytest.raises(CheckFailed, match=r"for x of shape .*, n = 3 it gives 3 where 4 is right"):
        grade(lambda x, n: n, [(torch.ones(2), 3)], lambda x, n: n + 1, "adding", {})
    with pytest.raises(CheckFailed, match="for names of length 1 it gives 2 where 1 is right"):
        grade(lambda names: 2 * len(names), [(["a"],)], lambda names: len(names), "counting", {})
    with pytest.raises(CheckFailed, match="for its arguments it gives 2 where 1 is right"):
        grade(lambda names: 2 * len(names), [({"a"},)], lambda names: len(names), "counting", {})


def test_right_answers_pass_and_leave_the_seed_alone(capsys):
    state = torch.get_rng_state()
    graded(lambda x: x + x)
    graded(lambda x: (x + x).numpy())
    graded(lambda x: (x + x).numpy()[::-1, ::-1][::-1, ::-1])
    graded(lambda x: (x + x).tolist())
    graded(lambda x: list((x + x).requires_grad_()))
    assert "agrees with doubling in 2 random cases" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("answer", [None, {"a": "up"}, {"a": "up", "b": "down", "c": "up"}, {"a": "up", "b": "left"}])
def test_a_prediction_has_the_keys_and_words_that_are_asked_for(answer):
    said = r'<lambda> should return "up", "down" or "same" for each of a, b; '
    with pytest.raises(CheckFailed, match=said):
        predict(lambda: answer, keys=["a", "b"], words=("up", "down", "same"))
    with pytest.raises(CheckFailed, match=r"<lambda> should return a dict with the keys a, d; "):
        predict(lambda n: answer, 3, keys=["a", "d"])
    assert predict(lambda n: {"a": n}, 3, keys=["a"]) == {"a": 3}


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0), Fraction(1)])
def test_a_number_of_any_library_is_a_number(value):
    assert predict(lambda: {"a": value}, keys=["a"], numbers=True) == {"a": 1}


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        True,
        [1],
        {},
        1j,
        pytest.param(10**400, id="10**400"),
        torch.ones(1),
        torch.tensor(True),
        np.ones(2),
        set(),
    ],
)
def test_no_number_is_said_to_be_none(value):
    with pytest.raises(CheckFailed, match="<lambda>: a: a number is needed; got "):
        predict(lambda: {"a": value}, keys=["a"], numbers=True)
    with pytest.raises(CheckFailed, match="; a is "):
        predict(lambda: {"a": value}, keys=["a"], words=("up", "down"))


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)])
def test_true_counts_where_it_may_stand_for_a_number(value):
    assert number(value, "here", true=10) == 10 and number(value, "here", true=1) == 1
    assert number(not value, "here", true=10) == 0
    with pytest.raises(CheckFailed, match="here: a number is needed"):
        number(value, "here")


def test_zero_has_no_sign():
    with pytest.raises(CheckFailed, match=r"for n = 0 it gives 0 where 1 is right"):
        grade(lambda n: -0.0, [(-0.0,)], lambda n: 1, "a table", {})


def test_infinity_is_right_only_where_it_is_right():
    target = torch.tensor([1.0, torch.inf])
    grade(lambda x: [1, math.inf], [(0,)], lambda x: target, "a table", {"wrong": lambda x: -target})
    for wrong in (-1, 1e9, -math.inf, math.nan):
        with pytest.raises(CheckFailed, match=r"where inf is right \(entry 1 of 2\)"):
            grade(lambda x, wrong=wrong: [1, wrong], [(0,)], lambda x: target, "a table", {})


def test_what_differs_is_shown():
    right = torch.tensor([1e9, 1.0], dtype=torch.float64)
    with pytest.raises(CheckFailed, match=r"gives 1\.000001 where 1 is right \(entry 1 of 2\)"):
        grade(lambda x: right + torch.tensor([10, 1e-6]), [(0,)], lambda x: right, "a table", {})


class Named(NamedTuple):
    text: list


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ([torch.ones(2)], lambda x: x.pop()),
        ({"a": np.ones(2)}, lambda x: x["a"].fill(0)),
        ({"a": [1]}, lambda x: x.update(b=1)),
        (Named([1]), lambda x: x.text.append(2)),
        ({1, 2}, lambda x: x.add(3)),
        (SimpleNamespace(a=[1]), lambda x: x.a.append(1)),
        (torch.nn.Linear(2, 2), lambda x: x.weight.data.zero_()),
        (torch.nn.Linear(2, 2), lambda x: x.eval()),
        (torch.nn.Sequential(torch.nn.ReLU()), lambda x: x[0].register_forward_hook(print)),
    ],
)
def test_a_change_in_place_is_seen_and_does_no_harm(argument, change):
    before = repr(argument)
    with pytest.raises(CheckFailed, match=r"in place|leaves the model changed"):
        call(lambda x: change(x), argument)
    assert repr(argument) == before
    call(lambda x: change(copy.deepcopy(x)), argument)


def left_without_gradients(x):
    torch.set_grad_enabled(False)
    return 2 * x


def left_in_half(x):
    torch.set_default_dtype(torch.float16)
    return 2 * x


def left_hooked(x):
    torch.nn.modules.module.register_module_forward_pre_hook(print)
    return 2 * x


@pytest.mark.parametrize("answer", [left_without_gradients, left_in_half, left_hooked])
def test_what_an_answer_changes_in_torch_is_refused_and_taken_back(answer):
    with pytest.raises(CheckFailed, match="leaves torch changed"):
        graded(answer)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert not torch.nn.modules.module._global_forward_pre_hooks


def first(x):
    return x[len(x)]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (
            first,
            r"IndexError for x of shape \(3, 4\), where a tensor \(3, 4\) was expected: .*, in `return x\[len\(x\)\]`",
        ),
        (lambda x: next(iter([])), r"StopIteration for x"),
        (lambda x: {}[len(x)], "KeyError for x .* expected: 3, in `"),
        (lambda: 1, r"TypeError for an argument of shape \(3, 4\), .* takes 0 positional arguments but 1 was given$"),
    ],
)
def test_an_error_is_named_with_its_input_and_its_line(answer, kind):
    with pytest.raises(CheckFailed, match=f"{answer.__name__} raises {kind}"):
        graded(answer)


def test_what_cannot_be_tried_of_an_input_is_said():
    def variant(x, **bugs):
        return {1: 2}[x]

    with pytest.raises(CheckFailed, match=r"<lambda> raises KeyError when input 2 is tried, where one that fits x was"):
        hunting.hunt(lambda: [(1,), (3,)], variant, {"a bug": {}}, {"x": hunting.POSITIVE})


def test_verdict_is_one_line_in_a_notebook():
    interactive = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()

    def stub(x):
        raise NotImplementedError("Exercise 9.9")

    for function, line in [(stub, "NotWritten: Exercise 9.9"), (lambda x: x / 2, "CheckFailed: <lambda>: halved")]:
        with pytest.raises((NotWritten, CheckFailed)) as raised:
            graded(function)
        shown = []
        interactive._showtraceback = lambda kind, value, lines, shown=shown: shown.extend(lines)
        interactive.showtraceback((raised.type, raised.value, raised.tb))
        assert shown == [line]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda seed: 3.0, "returns a float"),
        (lambda seed: {"found": seed}, 'has no "control"'),
        (lambda seed: {"control": seed}, "the control alone"),
        (lambda seed: {"control": seed, "found": float("nan")}, "'found' is nan"),
        (lambda seed: {"control": seed, "found": [1, 2]}, "a finite number is needed"),
        (lambda seed: {"control": seed, "found": str(seed)}, "a finite number is needed"),
        (lambda seed: {"control": seed, "found": seed == 1}, "'found' is False; a finite number is needed"),
        (lambda seed: {"control": seed, "found": None}, "'found' is None; a finite number is needed"),
        (lambda seed: {"control": seed, seed: 1}, "other names under another seed"),
        (lambda seed: {"control": seed, f"found{seed}": 1}, "other names under another seed"),
        (lambda seed: {"control": 0, "found": float(torch.rand(()))}, "two runs of .* differ"),
        (lambda seed: {"control": 0, "found": 1}, "the same numbers under seeds"),
        (lambda seed: {"control": seed, "found": seed}, "everything equals the control"),
    ],
)
def test_conduct_of_an_experiment(answer, complaint):
    with pytest.raises(CheckFailed, match=complaint):
        experiment.conduct(answer)


def test_sound_experiment_passes(capsys):
    experiment.conduct(lambda seed: {"control": seed, "found": seed + 1})
    assert "varies with the seed" in capsys.readouterr().out
