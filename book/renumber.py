"""Label every numbered equation by the number that its page prints, eq-NN-k, wherever the label is named.

    python book/renumber.py

A new equation gets a label of its own, such as eq-03-new; this then moves up those that follow, in the chapters, the
pages and the library. Afterwards `make sync`.
"""

from pathlib import Path

from chapters import is_appendix, slugs
from check_chapters import EQUATION, LABEL, source
from notebooks import ROOT


def renumber(root: Path = ROOT) -> list[Path]:
    """The files that it changed."""
    book, new, changed = root / "book", {}, []
    for slug in slugs(book):
        if is_appendix(slug):
            continue
        labels = [label for _, label in EQUATION.findall(source(slug, book))]
        if len(set(labels)) < len(labels):
            raise ValueError(f"book/src/{slug}.md has two equations of one label among {', '.join(labels)}")
        new |= {label: f"eq-{slug[:2]}-{k}" for k, label in enumerate(labels, start=1)}
    paths = sorted([*book.glob("*.md"), *book.glob("src/*.md"), *(root / "cratelab").rglob("*.py")])
    texts = {path: path.read_text(encoding="utf8") for path in paths}
    for path, text in texts.items():
        if taken := {match[0] for match in LABEL.finditer(text)} & (set(new.values()) - set(new)):
            cited = f"{path.relative_to(root)} cites {', '.join(sorted(taken))}, which is no equation"
            raise ValueError(f"{cited}, but would be one afterwards: mend that first")
    for path, text in texts.items():
        renamed = LABEL.sub(lambda match: new.get(match[0], match[0]), text)
        if renamed != text:
            path.write_text(renamed, encoding="utf8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in renumber():
        print(path.relative_to(ROOT))
