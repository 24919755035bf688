"""Local corpora: JSON lines (plain, .gz, .zst), Parquet and text, a file or a folder of them, in constant memory.

A row is `{"text": …, "meta": {…}}`, the form of The Pile, or has its other facts beside `text`. Nothing that is wrong
with a file passes in silence: a line that is no such row stops the reading, or is skipped, counted and reported.
"""

import gzip
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cratelab.corpora.documents import Document
from cratelab.extras import require

_JSONL, _TEXT = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md", ".rst", ".raw")
_COMPRESSED = (".gz", ".zst")
KINDS = (*_JSONL, *_TEXT, ".parquet")

# What a file or folder is for, by the words of its name; of several the first that applies.
_WORDS_OF_SPLITS = {
    "test": {"test", "testing", "tests", "tst", "devtest", "valtest", "heldout", "holdout"},
    "validation": {"validation", "validate", "valid", "val", "dev", "devel", "development", "eval", "evaluation"},
    "train": {"train", "training"},
}
# What stands beside a data set, to be read by people or by the hub: README_2.md, readme.md; not notice_of_appeal.txt.
_ABOUT = re.compile(
    r"(README|LICEN[CS]E|COPYING|NOTICE|CITATION|CHANGELOG|DATASHEET)(?![A-Za-z])"
    r"|(?i:readme|licen[cs]e|copying|notice|citation|changelog|datasheet|dataset_(card|infos?))\."
)

TEXT_DOCUMENT = 4096  # characters of a text file after which a document ends with its paragraph
_LONGEST_LINE = 2**25  # bytes: 32 MiB, ten times War and Peace


class MalformedLine(ValueError):
    """A line of a JSON-lines file, or a row of Parquet, that is no document; the message names file, line, reason."""


@dataclass(frozen=True)
class SkippedLine:
    """Where a line or row was skipped (both count from 1), and why."""

    file: str
    line: int
    reason: str


class LocalDocuments:
    """The documents of a local file or folder; iterate as often as you like.

    Each row's `meta` is kept, with the row's other fields in it. `meta["domain"]` is the row's own, else its
    `pile_set_name`, else `domain`, else the name of the file without its endings.

    Args:
        path: a file, or a folder whose files are read in the order of their paths; `~` is the home folder. Known are
            .jsonl (.ndjson, .json), .txt (.text, .md, .rst, .raw), each also with .gz or .zst, and .parquet. Text is
            cut into documents at the first end of a paragraph after 4,096 characters, or of a line or word if there is
            none before 8,192; joined, they are the file. Links are followed. Left out are hidden files and folders,
            and what is about a data set (README, LICENSE, dataset_infos.json and their kind) unless there is no other.
        split: "train", "validation" or "test": of a folder only the files that bear that name; see `split_named_by`.
            Where some file bears the name of another split and none that of "train", those without one are "train".
        on_error: "raise" stops at the first malformed line or damaged file; "skip" goes on after a warning, and raises
            only if no file was whole.
        text: the field that holds the text.
        domain: of documents that do not say.

    Attributes:
        n_skipped: lines and rows skipped in the latest iteration.
        skipped: the first 100 of them.

    Raises:
        FileNotFoundError: there is no `path`, or no file of that split or a known kind below it.
        ValueError: an argument or the file's kind is unknown. While reading, with the file's name: `MalformedLine`, of
            which lines above 32 MiB are some; and ValueError for a file that is damaged, cut off, no UTF-8, or without
            the field.

    Empty lines and files are no documents and no errors.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        on_error: str = "raise",
        text: str = "text",
        domain: str | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip"; got {on_error!r}')
        if split is not None and split not in _WORDS_OF_SPLITS:
            raise ValueError(f"split must be one of {', '.join(reversed(_WORDS_OF_SPLITS))}; got {split!r}")
        self.files = _find(Path(os.path.expanduser(path)), split)
        self.on_error, self.text, self.domain = on_error, text, domain
        self.n_skipped, self.skipped = 0, []

    def __iter__(self) -> Iterator[Document]:
        self.n_skipped, self.skipped = 0, []
        n_damaged = 0
        for file in self.files:
            before = self.n_skipped
            try:
                yield from self._read(file)
            except (ValueError, OSError) as error:
                n_damaged += 1
                if self.on_error == "raise" or n_damaged == len(self.files):
                    raise
                warnings.warn(f"{error}. The rest of this file is skipped", stacklevel=2)
            if n := self.n_skipped - before:
                mine = [skipped for skipped in self.skipped if skipped.file == str(file)]
                lines = ", ".join(str(skipped.line) for skipped in mine[:10]) + (", …" if n > 10 else "")
                what = f"{n} malformed lines skipped ({lines})" if mine else f"{n} malformed lines skipped"
                warnings.warn(f"{file}: {what}" + (f"; the first {mine[0].reason}" if mine else ""), stacklevel=2)

    def _read(self, file: Path) -> Iterator[Document]:
        kind, domain = _kind(file), self.domain or file.name.split(".")[0]
        if kind in _TEXT:
            for text in _texts(file):
                yield Document(text, {"domain": domain})
        elif kind == ".parquet":
            yield from self._read_parquet(file, domain)
        else:
            yield from self._read_lines(file, domain)

    def _read_lines(self, file: Path, domain: str) -> Iterator[Document]:
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"is longer than {_LONGEST_LINE} bytes")
                yield as_document(json.loads(line.decode("utf-8-sig").rstrip("\r\n")), self.text, domain)
            except (ValueError, RecursionError) as error:  # of the decoders, and our own
                reason = f"is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
                self._malformed(file, "line", number, reason)

    def _read_parquet(self, file: Path, domain: str) -> Iterator[Document]:
        number = 0
        with _parquet_damage_named(file), require("pyarrow.parquet").ParquetFile(file) as table:
            if self.text not in (names := table.schema_arrow.names):
                raise MalformedLine(
                    f"{file}: a row has no text: the field {self.text!r} is missing among {', '.join(names)}"
                )
            for batch in table.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        yield as_document(row, self.text, domain)
                    except (ValueError, RecursionError) as error:
                        self._malformed(file, "row", number, str(error))

    def _malformed(self, file: Path, what: str, number: int, reason: str) -> None:
        if self.on_error == "raise":
            raise MalformedLine(
                f'{file}, {what} {number}: {reason}. Expected {{"{self.text}": "…"}}; mend the {what}, or pass '
                f'on_error="skip" to leave such {what}s out and have them counted'
            ) from None
        self.n_skipped += 1
        if len(self.skipped) < 100:
            self.skipped.append(SkippedLine(str(file), number, reason))


def as_document(row: object, text: str = "text", domain: str | None = None) -> Document:
    """A document from a row of JSON, Parquet or the hub.

    Raises:
        ValueError: the row is no object, or its field `text` is missing or no string.
    """
    if not isinstance(row, dict):
        raise ValueError(f"holds no JSON object but {type(row).__name__}")
    if not isinstance(row.get(text), str):
        found = f"is missing among {', '.join(map(str, row))}"
        if text in row:
            found = "is null" if row[text] is None else f"is {type(row[text]).__name__}"
        raise ValueError(f"has no text: the field {text!r} {found}")
    facts = {key: value for key, value in row.items() if key not in (text, "meta")}
    facts |= row["meta"] if isinstance(row.get("meta"), dict) else {"meta": row.get("meta")}
    facts = {key: value for key, value in facts.items() if value is not None}
    facts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in facts.items()}
    facts["domain"] = facts.get("domain") or facts.get("pile_set_name") or domain or ""
    return Document(row[text], facts)


def split_named_by(path: str | Path) -> str | None:
    """The split that a file's name, or that of a folder in `path`, names: "train", "validation", "test" or None.

    Letters that stand together are a word, whatever their case, so `wiki.train.raw`, `train_0.txt`, `owt_valid` and
    `Test-00000-of-00002` name one, `latest` and `contest` none; "set", "data" or "split" may follow without a break.
    Known are train, training; validation, validate, valid, val, dev, devel, development, eval, evaluation; test,
    testing, tests, tst, devtest, valtest, heldout, holdout. What is named for test is test whatever else it is named
    for, and so is then validation.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(path))
    name = re.sub(r"(held|hold)[ _.-]?out", "heldout", name.lower())
    words = set(re.findall(r"[^\W\d_]+", name))
    words |= {re.sub("(set|data|split)$", "", word) for word in words}
    return next((split for split, names in _WORDS_OF_SPLITS.items() if words & names), None)


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _find(path: Path, split: str | None) -> list[Path]:
    known = f"known are {' '.join(KINDS)}, also with .gz or .zst"
    if os.path.isfile(path):
        if _kind(path) not in KINDS:
            raise ValueError(f"{path} is of no known kind; {known}")
        return [path]
    if not os.path.isdir(path):
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = sorted(file for file in _walk(path) if _kind(file) in KINDS)
    files = [file for file in files if not _is_about(file)] or files
    if not files:
        raise FileNotFoundError(f"{path} holds no file; {known}")
    if split is None:
        return files
    named = {file: split_named_by(file.relative_to(path)) for file in files}
    if split == "train" and "train" not in named.values() and any(named.values()):
        split = None
    if split not in named.values():
        raise FileNotFoundError(
            f"{path} holds no file of the split {split or 'train'!r} among its {len(files)}: a file, or a "
            "folder above it, bears the name of its split"
        )
    return [file for file in files if named[file] == split]


def _is_about(file: Path) -> bool:
    """Whether it stands beside a data set, for people or for the hub to read."""
    return _kind(file) in (*_TEXT, ".json") and _ABOUT.match(file.name) is not None


def _walk(folder: Path) -> Iterator[Path]:
    """The files below `folder` that are not hidden; a folder to which links lead once, by its own name first."""
    folders, links, seen = [folder], [], set()
    while folders or links:
        current = folders.pop() if folders else links.pop()
        identity = current.stat().st_dev, current.stat().st_ino
        if identity in seen:
            continue
        seen.add(identity)
        for name in sorted(os.listdir(current)):
            path = current / name
            if name.startswith("."):
                continue
            if os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            elif os.path.isfile(path):
                yield path


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long the beginning, one byte more than it may have."""
    number = 0
    with _damage_named(file, lambda: f" after line {number}"), _open(file) as lines:
        while line := lines.readline(_LONGEST_LINE + 1):
            number += 1
            yield number, line
            if len(line) > _LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(2**16)


def _texts(file: Path) -> Iterator[str]:
    """A text file in pieces that end where a paragraph, a line or a word does."""
    with _damage_named(file, lambda: ""), _open(file) as content:
        text = io.TextIOWrapper(content, "utf-8-sig", newline="")
        held, ended = "", False
        while not ended:
            try:
                read = text.read(TEXT_DOCUMENT)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}; convert it first") from error
            held, ended = held + read, not read
            while end := _end_of_document(held, ended):
                yield held[:end]
                held = held[end:]
        if held:
            yield held


def _end_of_document(text: str, ended: bool) -> int:
    """Where the first document of a text ends; 0 if that is not yet to be seen, or at its end."""
    first, last = TEXT_DOCUMENT, 2 * TEXT_DOCUMENT
    if paragraph := re.compile(r"\n[ \t\r]*\n").search(text, first, last):
        return paragraph.end()
    if len(text) < last and not ended:
        return 0
    line_or_word = re.compile(r"\n").search(text, first, last) or re.compile(r"\s").search(text, first, last)
    return line_or_word.end() if line_or_word else last if len(text) > last else 0


@contextmanager
def _damage_named(file: Path, where: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # not the content: the file is gone, or may not be read
        if "too much memory" in str(error):
            raise ValueError(
                f"{file} is packed with a window above 128 MiB (zstd --long), too large to be read as a stream: unpack "
                "it with `zstd -d --long=31`"
            ) from error
        raise ValueError(f"{file} is damaged or cut off{where()}: {error}; copy or download it again") from error


@contextmanager
def _parquet_damage_named(file: Path) -> Iterator[None]:
    """Arrow raises what it will on bytes that are no Parquet, and does not name the file."""
    try:
        yield
    except (MalformedLine, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise  # not the content
        raise ValueError(f"{file} cannot be read as Parquet: {error}; copy or download it again") from error


def _open(file: Path) -> BinaryIO:
    if file.suffix.lower() in _COMPRESSED and file.stat().st_size == 0:
        raise EOFError("it is empty, which no compressed file is")
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if file.suffix.lower() == ".zst":
        # Arrow's reader, since that of the package zstandard takes a file that is cut off for one that ends
        return io.BufferedReader(require("pyarrow").input_stream(str(file), compression="zstd"))
    return file.open("rb")
