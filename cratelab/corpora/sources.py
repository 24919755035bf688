"""What a corpus by its name is read from: which of its documents are to train and to validate on, and its identity.

The rules are stated in `cratelab.corpora.prepare`.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from cratelab.corpora import hub, pydocs
from cratelab.corpora.documents import Document, encode_utf8, select
from cratelab.corpora.files import LocalDocuments, split_named_by
from cratelab.storage import digest_of_file

HUB = {"wikitext": hub.wikitext, "tinystories": hub.tiny_stories, "pile": hub.pile}
PYTHON = {"pydocs": pydocs.standard_library, "packages": pydocs.packages}
_HASHED_WHOLE = 2**30  # bytes of a local corpus


class CorpusText:
    """What a corpus has to train and to validate on; nothing is read before it is asked for.

    Raises:
        FileNotFoundError: in a folder whose files name splits there is none to train on.
    """

    def __init__(self, parts: list[str], characters: int):
        self.characters = characters
        named = {  # of parts that are joined, as if they were in one folder
            part: split_named_by(Path(os.path.abspath(part)).name)
            for part in parts
            if len(parts) > 1 and part not in (*HUB, *PYTHON)
        }
        held_out = {split for split in named.values() if split in ("validation", "test")}
        self.parts = []
        for name in parts:
            if named.get(name) in held_out:
                self.parts.append(_Part(name, {named[name]}, cut=False, whole=True))
                continue
            part = _Part(name, *_splits_of(name))
            if held_out and name in named:
                part.whole = not part.own
                part.own, part.cut = part.own or {"train"}, part.cut and "validation" not in held_out
            self.parts.append(part)

    def training(self) -> Iterator[Document]:
        kept = (document for document in self._of("train") if _digest(document) not in self._held_out)
        return self._some(first_characters(kept, self.characters), "train")

    def validation(self) -> Iterator[Document]:
        documents = self._of("validation")
        if self._substitute:
            documents = (document for document in self._by_hash() if _digest(document) == self._substitute)
        return self._some(first_characters(documents, self._validation_characters), "validate")

    @property
    def splits(self) -> list:
        """What was decided about each of the parts, also by the name of a folder; it belongs to their identity."""
        return [[sorted(part.own), part.cut, part.whole] for part in self.parts]

    @property
    def _validation_characters(self) -> int:
        return max(1, self.characters // 20)

    @cached_property
    def _held_out(self) -> set[bytes]:
        """The texts that are not to be trained on. Where the hash alone decides, none has to be remembered."""
        held_out = {self._substitute} - {None}
        if any(part.own for part in self.parts):
            for part in self.parts:
                validation = part.documents("validation")
                if part.name in HUB:  # as much as will be read
                    validation = first_characters(validation, self._validation_characters)
                held_out.update(map(_digest, chain(validation, part.documents("test"))))
        return held_out

    @cached_property
    def _substitute(self) -> bytes | None:
        """The text to validate on where there is none otherwise: that with the lowest hash."""
        if next(self._of("validation"), None):
            return None
        return min(map(_digest, self._by_hash()), default=None)

    def _of(self, split: str) -> Iterator[Document]:
        documents = chain.from_iterable(part.documents(split) for part in self.parts)
        return (document for document in documents if document.text.strip())

    def _by_hash(self) -> Iterator[Document]:
        """All that the hash divides."""
        documents = chain.from_iterable(part.all_for_training() for part in self.parts if part.cut)
        return (document for document in documents if document.text.strip())

    def _some(self, documents: Iterator[Document], purpose: str) -> Iterator[Document]:
        first = next(documents, None)
        if first is None:
            name = "+".join(part.name for part in self.parts)
            raise ValueError(
                f"{name} has no text to {purpose} on, beside what is held out for other splits: give more text, two "
                "documents at least, or a folder in which files are named train and validation"
            )
        return chain([first], documents)


@dataclass
class _Part:
    """One of the corpora that are joined.

    Attributes:
        name: or path.
        own: the splits that it has by itself; none where the hash decides about all of it.
        cut: whether the hash divides what it has to train on.
        whole: whether all of it is its only split, whatever its files are named.
    """

    name: str
    own: set[str]
    cut: bool
    whole: bool = False

    def documents(self, split: str) -> Iterator[Document]:
        if split != "train" and split in self.own:
            return iter(HUB[self.name](split) if self.name in HUB else self._local(split))
        if self.cut:
            return select(self.all_for_training(), split)
        return self.all_for_training() if split == "train" else iter(())

    def all_for_training(self) -> Iterator[Document]:
        if self.own and "train" not in self.own:
            return iter(())
        if self.name in HUB:
            return iter(HUB[self.name]("train"))
        if self.name in PYTHON:
            return iter(PYTHON[self.name]())
        return iter(self._local("train" if self.own else None))

    def _local(self, split: str | None) -> LocalDocuments:
        return LocalDocuments(self.name, None if self.whole else split)


def _splits_of(part: str) -> tuple[set[str], bool]:
    """The splits that a corpus has by itself, and whether what it has to train on is to be divided."""
    if part in HUB:
        return {"train", "validation"}, False
    if part in PYTHON or not os.path.isdir(part):
        return set(), True
    named = {file: split_named_by(file.relative_to(part)) for file in LocalDocuments(part).files}
    own = set(named.values()) - {None}
    if own:
        LocalDocuments(part, "train")  # raises if there is none
    if "train" in own and (left_out := [file for file, split in named.items() if split is None]):
        warnings.warn(
            f"{part}: {len(left_out)} files that are named for no split are left out, such as {left_out[0].name}, "
            f"since {next(file.name for file in named if named[file] == 'train')} is named for training: rename one "
            "or the other if they belong together",
            stacklevel=4,
        )
    return own | ({"train"} if own else set()), "validation" not in own


def identity(part: str) -> object:
    """What tells the text of one corpus from another, where that can be told."""
    if part in HUB:
        return part
    if part in PYTHON:
        return {name: pydocs.sources(name) for name in (["python"] if part == "pydocs" else pydocs.installed())}
    root = Path(part) if os.path.isdir(part) else Path(part).parent
    files = LocalDocuments(part).files
    about = {file.relative_to(root).as_posix(): file.stat() for file in files}
    if sum(each.st_size for each in about.values()) > _HASHED_WHOLE:
        return {name: [each.st_size, each.st_mtime_ns, each.st_ctime_ns] for name, each in about.items()}
    return {name: digest_of_file(file) for name, file in zip(about, files, strict=True)}


def first_characters(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    """Documents up to the one that makes so many characters."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document.text)
        yield document


def _digest(document: Document) -> bytes:
    return blake2b(encode_utf8(document.text), digest_size=16).digest()
