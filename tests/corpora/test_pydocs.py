import inspect
import json.decoder
import textwrap

import pytest

from cratelab.corpora import pydocs


@pytest.fixture(scope="module")
def documents():
    return list(pydocs.standard_library())


def test_it_holds_what_python_itself_shows_as_documentation(documents):
    texts = {document.meta["path"]: document.text for document in documents}
    for module, path in [(json.decoder, "json/decoder.py"), (textwrap, "textwrap.py")]:
        members = [
            member for _, member in inspect.getmembers(module) if getattr(member, "__module__", "") == module.__name__
        ]
        for documented in [*members, module]:
            if documented.__doc__:
                assert inspect.getdoc(documented).strip() in texts[path]
    domains = {document.meta["path"]: document.meta["domain"] for document in documents}
    assert domains["json/decoder.py"] == "json" and domains["textwrap.py"] == "textwrap"


def test_it_is_large_and_mostly_english_letters(documents):
    text = "".join(document.text for document in documents)
    assert len(text) > 1_000_000
    assert sum(character.isascii() for character in text) / len(text) > 0.999
    assert len({document.meta["domain"] for document in documents}) > 100


def test_it_is_the_same_each_time_and_has_no_tests_or_packages_in_it(documents):
    paths = [document.meta["path"] for document in documents]
    assert paths == sorted(paths, key=lambda path: path.split("/")) and len(set(paths)) == len(paths)
    assert not [path for path in paths if "site-packages" in path or "/test/" in path or path.startswith("test/")]
    assert next(pydocs.standard_library()) == documents[0]


def test_sources_are_read_not_run_and_broken_ones_left_out(tmp_path):
    (tmp_path / "loud.py").write_text(
        '"""Loud."""\nraise SystemExit("was run")\ndef f():\n    """Inner.\n\n       Indented."""\n'
    )
    (tmp_path / "broken.py").write_text('"""Broken."""\ndef (:\n')
    (tmp_path / "binary.py").write_bytes(b'"""\xff\xfe"""\n')
    (tmp_path / "null.py").write_bytes(b'"""Null."""\n\0\n')
    (tmp_path / "deep.py").write_text('"""Deep."""\nx = ' + "-" * 100_000 + "1\n")
    (tmp_path / "long.py").write_text('"""Long."""\nx = 1' + " + 1" * 100_000 + "\n")
    (tmp_path / "no_text.py").write_text('# -*- coding: rot13 -*-\n"""Encoded."""\n')
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "removed.py")
    (tmp_path / "silent.py").write_text("x = 1\n")
    for name in "test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages":
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside.py").write_text('"""Inside."""\n')
    (document,) = pydocs.standard_library(tmp_path)
    assert document == pydocs.Document("Loud.\n\nInner.\n\nIndented.\n", {"domain": "loud", "path": "loud.py"})
    assert [document.meta["path"] for document in pydocs.standard_library(tmp_path / "test")] == ["inside.py"]


def test_docstrings_stand_in_source_order_and_no_warning_escapes(tmp_path):
    (tmp_path / "module.py").write_text(
        'class A:\n    "A."\n    async def a(self):\n        """Inside.  \n\n        """\n'
        'def f():\n    "f."\nescape = "\\d"\n'
    )
    (document,) = pydocs.standard_library(tmp_path)  # warnings are errors here
    assert document.text == "A.\n\nInside.\n\nf.\n"


def test_a_folder_without_sources_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no Python sources"):
        list(pydocs.standard_library(tmp_path))


COMMENTED = '''#!/usr/bin/env python
# Copyright 1999 by nobody.
"""Module."""
import os  # noqa: F401  # the rest of it

# A comment of
# two lines: here.
#
# And a third.
y = 1
# Another block, though.
x = 1  # beside the code, it says

# ------
# y = os.getcwd()
# print(y)


def f():
    """Function."""
    text = "# in a string, no comment"
    # inside the function, this
    # type: ignore
    return text
'''


def test_comments_stand_among_the_docstrings_and_only_prose_does(tmp_path):
    (tmp_path / "module.py").write_text(COMMENTED)
    (document,) = pydocs.standard_library(tmp_path, comments=True)
    assert document.text == (
        "Module.\n\nA comment of\ntwo lines: here.\n\nAnd a third.\n\nAnother block, though.\n\n"
        "beside the code, it says\n\nFunction.\n\ninside the function, this\n"
    )
    (plain,) = pydocs.standard_library(tmp_path)
    assert plain.text == "Module.\n\nFunction.\n"


def test_installed_packages_are_read_not_imported(tmp_path, monkeypatch):
    for name in "loud", "quiet":
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(f'"""{name} package."""\nraise SystemExit("was imported")\n')
        (tmp_path / name / "inner.py").write_text("# Comment of a module,\n# two lines.\n")
        (tmp_path / name / "tests" / "test_a.py").write_text('"""Test."""\n')
    (tmp_path / "space").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    documents = list(pydocs.packages(["quiet", "loud"]))
    assert [(d.text, d.meta) for d in documents] == [
        ("quiet package.\n", {"domain": "quiet", "path": "quiet/__init__.py"}),
        ("Comment of a module,\ntwo lines.\n", {"domain": "quiet", "path": "quiet/inner.py"}),
        ("loud package.\n", {"domain": "loud", "path": "loud/__init__.py"}),
        ("Comment of a module,\ntwo lines.\n", {"domain": "loud", "path": "loud/inner.py"}),
    ]
    assert [d.text for d in pydocs.packages(["loud"], comments=False)] == ["loud package.\n"]
    with pytest.raises(ModuleNotFoundError, match=r"Python sources: absent, space, loud\.inner;"):
        next(pydocs.packages(["loud", "absent", "space", "loud.inner"]))


def test_of_the_scientific_packages_those_installed_are_read(monkeypatch):
    monkeypatch.setattr(pydocs, "SCIENTIFIC", ("absent", "einops"))
    documents = list(pydocs.packages())
    assert {document.meta["domain"] for document in documents} == {"einops"}
    assert "einops.rearrange is a reader-friendly smart element reordering" in "".join(d.text for d in documents)
