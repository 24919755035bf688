"""The book is whole: notebooks in sync with their text, executed, labelled; and each check fails when it should."""

import ast
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chapters
import check_chapters
import nbformat
import notebooks
import pytest
import renumber
import sync
import yaml
from matplotlib.figure import Figure

import cratelab
from cratelab import plots

ROOT, BOOK = notebooks.ROOT, notebooks.BOOK

SAMPLE = """\
# A chapter

Some text.

$$
a = b
$$ (eq-01-1)

By {eq}`eq-01-1`, so.

```{code-cell} python
print(1 + 1)
```

```{code-cell} python
:tags: [nbval-ignore-output]

print(2)
```

```{code-cell} python
assert 1 + 1 == 2
```
"""


@pytest.mark.parametrize("check", check_chapters.CHAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("slug", chapters.slugs())
def test_chapter(slug, check):
    assert list(check(slug)) == []


def test_equations_and_references():
    assert list(check_chapters.check_equations()) == []


def test_links_outside_the_pages(tmp_path):
    assert list(check_chapters.check_links()) == []
    ours = notebooks.repository_url()
    (tmp_path / "README.md").write_text(
        f"[a](README.md#here) [b](docs/gone.md) [c](https://arxiv.org/abs/2410.16443) [d](http://arxiv.org/abs/2410.1) "
        f"[e]({ours}/blob/main/gone.py) [f]({notebooks.colab_url('exercises/01_coding_rate.ipynb')})"
    )
    cell = nbformat.v4.new_markdown_cell("[g](https://arxiv.org/abs/24101.6443)")
    (tmp_path / "exercises").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "exercises" / "01.ipynb")
    assert list(check_chapters.check_links(tmp_path)) == [
        "README.md: there is no docs/gone.md",
        "README.md: an odd address: http://arxiv.org/abs/2410.1",
        "README.md: the repository has no gone.py",
        "exercises/01.ipynb: arxiv.org has no such address: https://arxiv.org/abs/24101.6443",
    ]


def test_every_chapter_is_in_the_table_of_contents_and_on_the_status_page():
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    listed = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    chosen = [name for name in listed if name[:2].isdigit()]
    assert sorted(chosen) == chapters.slugs()
    assert sorted(chosen, key=chapters.is_appendix) == chosen, "the appendices stand after the chapters"
    assert list(json.loads((BOOK / "execution.json").read_text())) == chapters.slugs()


def test_every_public_name_is_on_an_api_page():
    documented = {
        line.split("automodule::")[1].strip()
        for page in (BOOK / "api").glob("*.md")
        for line in page.read_text().splitlines()
        if "automodule::" in line
    }
    for name in cratelab.__all__:
        thing = getattr(cratelab, name)
        home = getattr(thing, "__module__", None) or thing.__name__  # a module has a name only
        inside = any(page == home or page.startswith(f"{home}.") for page in documented)
        assert inside, f"cratelab.{name} is on no page of book/api: add one with `.. automodule:: {home}`"
        assert thing.__doc__, f"cratelab.{name} has no docstring"


def test_the_repository_address_stands_in_one_place():
    address = notebooks.repository_url().split("://")[1]
    run = subprocess.run(["git", "grep", "-lF", address, "--", ":!*.ipynb"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode > 1:
        pytest.skip("not a git checkout")
    assert run.stdout.split() == ["book/_config.yml"]


def test_built_copies_are_not_collected(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    notebook = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]))
    for folder in ("book", "book/_build/html/_sources", "book/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "chapter.ipynb").write_text(notebook)
    command = [sys.executable, "-m", "pytest", "--nbval", "book/", "--collect-only", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    collected = [line for line in run.stdout.splitlines() if "::" in line]
    assert collected == ["book/chapter.ipynb::Cell 0"], run.stdout + run.stderr


def test_no_output_gives_zero_a_sign():
    for path in [*(notebooks.ROOT / "book").glob("*.ipynb"), *(notebooks.ROOT / "solutions").glob("*.ipynb")]:
        cells = nbformat.read(path, as_version=4).cells
        texts = [
            str(output.get("text")) + str(output.get("data")) for cell in cells for output in cell.get("outputs", ())
        ]
        for text in texts:
            assert not re.search(r"(?<![\w.])[-−]0(\.0*)?(?![\w.%])", text), f"{path.name}: format it with z"


def test_setup_cell_is_short_and_does_nothing_here():
    cell = notebooks.SETUP.format(url="https://example.org/never")
    assert len(cell.splitlines()) <= 4
    exec(compile(ast.parse(cell), "set-up cell", "exec"), {})


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A book of one small chapter, executed."""
    book = tmp_path_factory.mktemp("sample") / "book"
    (book / "src").mkdir(parents=True)
    shutil.copy(BOOK / "_config.yml", book)
    (book / "src" / "01_sample.md").write_text(SAMPLE)
    sync.update("01_sample", book)
    return book


@pytest.fixture
def book(executed, tmp_path) -> Path:
    return Path(shutil.copytree(executed, tmp_path / "book"))


def edit(book: Path, change) -> None:
    """Apply `change` to the sample's notebook, behind the back of its text."""
    notebook = chapters.read("01_sample", book)
    change(notebook)
    nbformat.write(notebook, book / "01_sample.ipynb")


def rewrite(book: Path, old: str, new: str) -> None:
    """Replace a piece of the sample's text, and generate its notebook without executing it."""
    path = book / "src" / "01_sample.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    nbformat.write(chapters.generate("01_sample", book), book / "01_sample.ipynb")


def messages(check, book: Path) -> str:
    return "\n".join(check("01_sample", book))


def test_sample_passes_every_check(book):
    assert [messages(check, book) for check in check_chapters.CHAPTER_CHECKS] == [""] * 5
    assert list(check_chapters.check_equations(book, library=book)) == []


def test_executing_again_gives_the_same_bytes(book):
    before = (book / "01_sample.ipynb").read_bytes()
    sync.update("01_sample", book)
    assert (book / "01_sample.ipynb").read_bytes() == before


def test_new_text_keeps_outputs_and_new_code_does_not(book):
    done = chapters.read("01_sample", book)
    rewrite(book, "Some text.", "Other text.")
    (book / "01_sample.ipynb").write_text(nbformat.writes(done))
    assert sync.update("01_sample", book, again=False) is None
    assert [messages(check, book) for check in check_chapters.CHAPTER_CHECKS] == [""] * 5
    rewrite(book, "print(1 + 1)", "print(1 + 2)")
    (book / "01_sample.ipynb").write_text(nbformat.writes(done))
    assert sync.update("01_sample", book, again=False) > 0
    assert chapters.read("01_sample", book).cells[2].outputs[0].text == "3\n"


def test_failing_cell_is_named_and_leaves_the_notebook(book):
    before = (book / "01_sample.ipynb").read_bytes()
    path = book / "src" / "01_sample.md"
    path.write_text(path.read_text().replace("print(1 + 1)", "1 / 0"))
    with pytest.raises(sync.ChapterError, match=r"01_sample\.md, code cell 2 failed[\s\S]*ZeroDivisionError"):
        sync.update("01_sample", book)
    assert (book / "01_sample.ipynb").read_bytes() == before


def test_the_name_of_an_exercise_leads_to_its_notebook(book):
    rewrite(book, "By {eq}", "Exercise 1.B asks. By {eq}")
    text = next(cell.source for cell in chapters.generate("01_sample", book).cells if "asks" in cell.source)
    assert f"[Exercise 1.B]({notebooks.colab_url('exercises/01_sample.ipynb', book)}) asks" in text


@pytest.mark.parametrize("name", ["1.Z", "99.A"])
def test_an_exercise_that_is_not_there_is_noticed(book, name):
    rewrite(book, "By {eq}", f"Exercise {name} asks. By {{eq}}")
    (message,) = check_chapters.check_names_of_exercises(book)
    assert message == f"book/src/01_sample.md: there is no exercise {name}"


def test_chapter_without_a_title_is_refused(book):
    with pytest.raises(ValueError, match="starts with a Markdown cell"):
        rewrite(book, "# A chapter", "No title")


def test_equal_cells_get_different_ids(book):
    rewrite(book, "print(2)", "print(1 + 1)")
    ids = [cell.id for cell in chapters.read("01_sample", book).cells]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda notebook: notebook.cells[2].update(source="print(3)"), "differs in source"),
        (lambda notebook: notebook.cells[2].update(id="other"), "differs in id"),
        (lambda notebook: notebook.cells[2].metadata.update(tags=["hide-cell"]), "differs in metadata"),
        (lambda notebook: notebook.metadata.update(language_info={"name": "python"}), "notebook metadata"),
        (lambda notebook: notebook.cells.pop(), "cells"),
    ],
)
def test_pair_out_of_sync_is_noticed(book, change, complaint):
    edit(book, change)
    assert complaint in messages(check_chapters.check_pair, book)


def test_missing_notebook_is_noticed(book):
    (book / "01_sample.ipynb").unlink()
    assert "does not exist" in messages(check_chapters.check_pair, book)


def output(kind: str, **fields):
    return [nbformat.v4.new_output(kind, **fields)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"execution_count": None}, "execution counts"),
        ({"outputs": output("error", ename="ValueError", evalue="no", traceback=[])}, "is an error"),
        ({"outputs": output("stream", name="stderr", text="Warning")}, "stderr"),
        ({"outputs": output("stream", name="stdout", text="/home/someone/file")}, "a path of this machine"),
        ({"metadata": {"tags": ["raises-exception"]}}, "nothing was raised"),
    ],
)
def test_unusable_output_is_noticed(book, change, complaint):
    edit(book, lambda notebook: notebook.cells[3].update(change))
    assert complaint in messages(check_chapters.check_executed, book)


def test_figure_without_alt_text_and_alt_text_without_figure_are_noticed(book):
    edit(book, lambda notebook: notebook.cells[2].update(outputs=output("display_data", data={"image/png": "iVBORw"})))
    assert "code cell 2: a figure needs an alt text" in messages(check_chapters.check_figures, book)
    rewrite(book, "print(1 + 1)", ':alt: "A line that rises from one to two, and a second: it stays where it is."\n\n1')
    assert "code cell 2: it has an alt text and draws nothing" in messages(check_chapters.check_figures, book)
    (cell,) = (cell for cell in chapters.read("01_sample", book).cells if "mystnb" in cell.metadata)
    assert cell.metadata == {"mystnb": {"image": {"alt": cell.metadata.mystnb.image.alt}}} and cell.source == "1"
    edit(book, lambda notebook: notebook.cells[2].update(outputs=output("display_data", data={"image/png": "iVBORw"})))
    assert messages(check_chapters.check_figures, book) == ""


def test_a_network_s_colour_used_for_something_else_is_noticed(book):
    shutil.copy(book / "01_sample.ipynb", book / "05_sample.ipynb")
    notebook = chapters.read("05_sample", book)
    figure, drawn = Figure(), io.BytesIO()
    figure.add_subplot().plot([0, 1], color=plots.GPT2)
    figure.savefig(drawn, format="png")
    notebook.cells[2].outputs = output("display_data", data={"image/png": base64.b64encode(drawn.getvalue()).decode()})
    for alt, complaints in {
        "A line that rises from nothing to one, from left to right.": ["the colour of GPT-2 (#D55E00)"],
        "A line for GPT-2 that rises from nothing to one.": [],
    }.items():
        notebook.cells[2].metadata = {"mystnb": {"image": {"alt": alt}}}
        nbformat.write(notebook, book / "05_sample.ipynb")
        found = list(check_chapters.check_figures("05_sample", book))
        assert len(found) == len(complaints) and all(part in one for part, one in zip(complaints, found, strict=True))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[nbval-ignore-output]", "[hide_input]", "unknown tag 'hide_input'"),
        ("assert 1 + 1 == 2", "print(4)", "must assert"),
        ("print(1 + 1)\n```", "print(1 + 1)\n```\n" + "\n```{code-cell} python\n1\n```\n" * 40, "at most 41"),
    ],
)
def test_unsuitable_cell_is_noticed(book, old, new, complaint):
    rewrite(book, old, new)
    assert complaint in messages(check_chapters.check_cells, book)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("(eq-01-1)\n", "(eq-02-1)\n", "expected eq-01-1"),
        ("(eq-01-1)\n", "(eq-01-2)\n", "prints (1.1)"),
        ("Some text.", "$$\nc\n$$ (eq-01-1)", "prints (1.2)"),
        ("Some text.", "$$\nc\n$$ (eq-01-2)", "prints (1.1)"),
        ("{eq}`eq-01-1`", "{eq}`eq-01-9`", "refers to no equation"),
    ],
)
def test_wrong_label_is_noticed(book, old, new, complaint):
    rewrite(book, old, new)
    assert complaint in "\n".join(check_chapters.check_equations(book, library=book))


def test_an_appendix_follows_its_chapter_and_numbers_no_equation(book):
    (book / "src" / "01a_more.md").write_text("# More\n\n$$\na\n$$ (eq-01-1)\n")
    (book / "src" / "01_02.txt").write_text("")
    assert chapters.slugs(book) == ["01_sample", "01a_more"] and chapters.is_appendix("01a_more")
    (message,) = check_chapters.check_equations(book, library=book)
    assert "those of an appendix have no numbers" in message


def test_renumbering_gives_each_equation_its_printed_number_everywhere(tmp_path):
    (book := tmp_path / "book" / "src").mkdir(parents=True)
    (library := tmp_path / "cratelab").mkdir()
    (book / "01_sample.md").write_text(SAMPLE.replace("Some text.", "$$\nc\n$$ (eq-01-new)\n\n{eq}`eq-01-new`"))
    (library / "module.py").write_text('"""As in eq-01-1, unlike eq-01-new or eq-01-10."""')
    assert len(renumber.renumber(tmp_path)) == 2 and renumber.renumber(tmp_path) == []
    text = (book / "01_sample.md").read_text()
    assert re.findall(r"eq-01-\w+", text) == ["eq-01-1", "eq-01-1", "eq-01-2", "eq-01-2"]
    assert (library / "module.py").read_text() == '"""As in eq-01-2, unlike eq-01-1 or eq-01-10."""'
    assert list(check_chapters.check_equations(book.parent, library=book)) == []
    (book / "01_sample.md").write_text(SAMPLE.replace("Some text.", "$$\nc\n$$ (eq-01-1)"))
    with pytest.raises(ValueError, match="two equations of one label"):
        renumber.renumber(tmp_path)


def test_what_cites_an_equation_that_is_gone_is_not_given_another(tmp_path):
    """Of three equations the second is taken out: the third becomes eq-01-2, which the text of the second cited."""
    (book := tmp_path / "book" / "src").mkdir(parents=True)
    (library := tmp_path / "cratelab").mkdir()
    (book / "01_sample.md").write_text("# One\n\n$$\na\n$$ (eq-01-1)\n\n$$\nc\n$$ (eq-01-3)\n")
    (library / "module.py").write_text('"""As in eq-01-2."""')
    with pytest.raises(ValueError, match=r"cratelab/module.py cites eq-01-2, which is no equation"):
        renumber.renumber(tmp_path)
    assert "eq-01-3" in (book / "01_sample.md").read_text(), "nothing is renumbered then"


def test_docstring_that_cites_no_equation_is_noticed(book, tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "module.py").write_text('"""As in eq-01-1 and eq-07-3."""')
    (message,) = check_chapters.check_equations(book, library=tmp_path / "library")
    assert message.startswith("library/module.py cites eq-07-3")
