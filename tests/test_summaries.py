"""The pages that summarise the parts and the glossary say nothing that their chapters do not."""

import re
from functools import cache

import pytest
from chapters import BOOK, is_appendix, read, slugs
from test_paper_and_us import NUMBER, printed

GLOSSARY = (BOOK / "glossary.md").read_text(encoding="utf8")
HEADING = re.compile(r"^## ", re.MULTILINE)
SOURCE = re.compile(r"\*\[Chapter (\d+)\]\((\w+)\.ipynb\)\.\*")
ENTRY = re.compile(r"^(\S.*)\n  .+ \[Chapter (\d+)\]\((\w+)\.ipynb\)$", re.MULTILINE)


@cache
def words_and_numbers(slug: str) -> str:
    """All that a chapter says and prints."""
    return "\n".join([*(cell.source for cell in read(slug).cells), printed(slug)])


def sections() -> list[tuple[str, str, str]]:
    """Page, chapter and text of every section that summarises a chapter."""
    found = []
    for page in sorted(BOOK.glob("summary_*.md")):
        for section in HEADING.split(page.read_text(encoding="utf8"))[1:]:
            if source := SOURCE.search(section):
                assert source[2].startswith(f"{int(source[1]):02}_")
                found.append((page.stem, source[2], SOURCE.sub("", section)))
    return found


def test_every_chapter_is_summarised_once():
    assert [slug for _, slug, _ in sections()] == [slug for slug in slugs() if not is_appendix(slug)]


def missing(text: str, source: str) -> list[str]:
    """Numbers of a text, small integers apart, that its source does not have."""
    text = re.sub(r"\{eq\}`[^`]+`|\]\([^)]+\)", "", text)
    numbers = [number for number in NUMBER.findall(text) if not (number.isdigit() and int(number) < 10)]
    known = set(NUMBER.findall(source))
    return [number for number in numbers if number not in known]


@pytest.mark.parametrize(("page", "slug", "text"), sections(), ids=lambda value: value if len(value) < 40 else "")
def test_numbers_of_a_summary_stand_in_its_chapter(page, slug, text):
    assert missing(text, words_and_numbers(slug)) == []
    assert missing(f"{text} 0.7391 and 77,777", words_and_numbers(slug)) == ["0.7391", "77,777"]


@pytest.mark.parametrize(("term", "number", "slug"), ENTRY.findall(GLOSSARY))
def test_a_term_of_the_glossary_is_used_in_its_chapter(term, number, slug):
    assert slug.startswith(f"{int(number):02}_")
    stem = term.lower().rstrip("s")
    assert stem in re.sub(r"\s+", " ", words_and_numbers(slug)).lower(), f"{term!r} does not occur in {slug}"


def test_the_glossary_holds_each_term_once_and_in_order():
    terms = [term.lower() for term, *_ in ENTRY.findall(GLOSSARY)]
    assert terms == sorted(set(terms)) and len(terms) == GLOSSARY.count("](") > 60
