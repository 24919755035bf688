import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))
over_seeds = pytest.importorskip("over_seeds", reason="the book's own packages are not installed")

CHAPTER = """# A chapter

```{{code-cell}} python
{first}
assert seed == 0, "an assertion speaks of the page's own run"
```

```{{code-cell}} python
{last}
```

```{{code-cell}} python
raise SystemExit("what follows the findings was run")
```
"""


def book(folder: Path, first: str, last: str) -> Path:
    (folder / "src").mkdir(parents=True)
    (folder / "_config.yml").write_text("repository: {url: nowhere}")
    (folder / "src" / "99_test.md").write_text(CHAPTER.format(first=first, last=last))
    return folder


def test_each_seed_and_setting_is_what_the_cells_see(tmp_path):
    folder = book(tmp_path, "import math\nseed = 0\nsteps = 5\n", "findings = {'sum': seed + steps, 'e': math.e}")
    code = over_seeds.code_to_findings("99_test", folder)
    assert over_seeds.run(code, {"seed": 3}) == {"sum": 8, "e": 2.718281828459045}
    assert over_seeds.run(code, {"seed": 3, "steps": "100"})["sum"] == 103
    with pytest.raises(ValueError, match="one line `width = …`; it has 0"):
        over_seeds.run(code, {"width": 3})


def test_a_cell_for_the_page_alone_is_neither_run_nor_counted(tmp_path):
    last = "findings = {'x': x}"
    page = "x = 1\nseed = 0\n```\n\n```{code-cell} python\n:tags: [hide-input, page-only]\n\nx = 2"
    with_cell, without = (
        over_seeds.code_to_findings("99_test", book(tmp_path / name, first, last))
        for name, first in (("a", page), ("b", "x = 1\nseed = 0\n"))
    )
    assert over_seeds.run(with_cell, {"seed": 0}) == {"x": 1}
    assert "x = 2" in (tmp_path / "a" / "src" / "99_test.md").read_text() and "x = 2" not in with_cell
    assert over_seeds.digest(with_cell.replace("assert", "# ")) == over_seeds.digest(without.replace("assert", "# "))


def test_a_setting_is_put_in_as_it_is_written(tmp_path):
    r"""A backslash means nothing to the search for the line: \\1 would be a group, \\n the end of the line."""
    code = over_seeds.code_to_findings(
        "99_test", book(tmp_path, "import math\nseed = 0\nend = 0\n", "findings = {'end': end}")
    )
    assert over_seeds.run(code, {"seed": 1, "end": r"'a\n\1'"})["end"] == "a\n\1"


@pytest.mark.parametrize("first, last", [("x = 1", "findings = {}"), ("x = 1\nseed = 0\n", "found = {}")])
def test_a_chapter_without_seed_or_findings_is_refused(tmp_path, first, last):
    with pytest.raises(ValueError, match="needs a line `seed = 0` and a cell that starts `findings = `"):
        over_seeds.code_to_findings("99_test", book(tmp_path, first, last))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--seeds", "-2"], "--seeds must be at least 1"),
        (["--set", "steps"], "--set takes NAME=VALUE; got steps"),
        (["--set", "steps=5", "=3"], "--set takes NAME=VALUE; got =3"),
        (["--set", "seed=3"], "--set takes no seed, which --seeds counts"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(options, message, monkeypatch, capsys):
    monkeypatch.setattr(over_seeds, "run", lambda *arguments: pytest.fail("a seed was run"))
    with pytest.raises(SystemExit):
        over_seeds.main([over_seeds.slugs()[0], *options])
    assert message in capsys.readouterr().err


TABLES = sorted((ROOT / "cratelab" / "reference").glob("[0-9][0-9]_*.json"))  # made from chapters


@pytest.mark.parametrize("table", TABLES, ids=[table.stem for table in TABLES])
def test_tables_were_made_by_the_cells_that_the_chapter_has_now(table):
    content = json.loads(table.read_text())
    slug = next(slug for slug in over_seeds.slugs() if table.stem.startswith(slug))
    command = f"python book/over_seeds.py {slug}"
    assert content["provenance"]["code"] == over_seeds.digest(over_seeds.code_to_findings(slug)), (
        f"{table.name} was made by other cells than book/src/{slug}.md has; run `{command}` with its settings again"
    )
    assert len(content["findings"]) == len(content["provenance"]["seeds"])
