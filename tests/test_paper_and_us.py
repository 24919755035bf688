"""The numbers that the page on the paper's claims quotes stand in the chapters that it names beside them."""

import re

import pytest
from chapters import BOOK, read, slugs

NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w-])")
PAGE = (BOOK / "paper_and_us.md").read_text(encoding="utf8")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| [A-Z]", line) and line.count("|") == 6]


def quotes(text: str, *numbers: str) -> bool:
    """Whether the text holds these numbers one after the other, with nothing but words between them."""
    found, n = NUMBER.findall(text), len(numbers)
    return any(found[i : i + n] == list(numbers) for i in range(len(found)))


def printed(slug: str) -> str:
    """What the cells of a chapter print."""
    outputs = (output for cell in read(slug).cells for output in cell.get("outputs", []))
    return "\n".join(output["text"] for output in outputs if output.get("name") == "stdout")


def unfounded(row: str) -> list[str]:
    """Numbers of a row, small integers apart, that the chapters it links to neither say nor print."""
    linked = [slug for slug in slugs() if f"({slug}.ipynb)" in row]
    known = {n for slug in linked for cell in read(slug).cells for n in NUMBER.findall(cell.source)}
    known |= {n for slug in linked for n in NUMBER.findall(printed(slug))}
    numbers = NUMBER.findall(re.sub(r"\]\([^)]+\)|\[chapter \d+|\{cite:p\}`\w+`", "", row))
    return [n for n in numbers if not (n.isdigit() and int(n) < 10) and n not in known]


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:40] for row in ROWS])
def test_numbers_stand_in_the_chapters_that_the_row_names(row):
    assert unfounded(row) == []
    assert unfounded(row.replace(" | ", " 0.7391 and 77,777 | ", 1)) == ["0.7391", "77,777"]


def test_numbers_are_quoted_in_order():
    assert quotes("by 2 to 6 points, GPT-2 by 1,024", "2", "6", "1,024")
    assert not quotes("by 2 to 6 points", "6", "2") and not quotes("by 12 to 60 points", "2", "6")
    assert not quotes("by 2 to 5 or 6 points", "2", "6")


def test_every_claim_has_numbers_a_place_and_a_verdict_and_says_what_would_change_it():
    assert len(ROWS) >= 10
    for row in ROWS:
        cells = [cell.strip() for cell in row.split("|")[1:6]]
        assert all(cells) and re.search(r"\.(ipynb|md)\)", cells[3]) and NUMBER.search(cells[1]), row
