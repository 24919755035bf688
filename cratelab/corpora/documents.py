"""What every corpus is: documents with `text` and `meta`, and a split that depends on nothing but a document's text.

Any iterable of `Document` is a corpus. By convention `meta["domain"]` names the part of the corpus that a document
belongs to (a subset of The Pile, a Python package, a genre), and is what the analyses by domain group by.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SPLITS = "train", "validation", "test"
FRACTIONS = 0.9, 0.05, 0.05


@dataclass
class Document:
    """One text with what is known of it.

    Attributes:
        text: the text.
        meta: facts about it; `domain` names the part of the corpus it belongs to.
    """

    text: str
    meta: dict[str, str] = field(default_factory=dict)


def split_of(text: str, fractions: tuple[float, float, float] = FRACTIONS) -> str:
    """The split that a text belongs to, the same on every machine and in every corpus that holds the text.

    The first 8 bytes of its BLAKE2 hash are a number that is uniform in [0, 2⁶⁴); the fractions cut that range. So
    copies of a text never stand in two splits, and adding documents moves none.

    Args:
        text: what is hashed, as UTF-8.
        fractions: of the texts in train, validation and test.

    Returns:
        "train", "validation" or "test".

    Raises:
        ValueError: the fractions are not three numbers, at least 0, whose sum is 1.
    """
    if len(fractions) != 3 or not all(f >= 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be three numbers, at least 0, whose sum is 1; got {fractions}")
    _, validation, test = fractions
    place = int.from_bytes(hashlib.blake2b(encode_utf8(text), digest_size=8).digest(), "big")
    if place < int(validation * 2**64):
        return "validation"
    return "test" if place < int((validation + test) * 2**64) else "train"


def select(
    documents: Iterable[Document], split: str, fractions: tuple[float, float, float] = FRACTIONS
) -> Iterator[Document]:
    """The documents of one split, in their order.

    Raises:
        ValueError: `split` is not "train", "validation" or "test", or the fractions are wrong.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    split_of("", fractions)  # raises before the first document is read
    return (document for document in documents if split_of(document.text, fractions) == split)


def encode_utf8(text: str) -> bytes:
    """UTF-8 that also takes the lone surrogates which JSON's escapes can spell, so that every str has a hash."""
    return text.encode("utf8", "surrogatepass")
