"""Local corpora: JSON lines (plain, .gz, .zst), Parquet and text, a file or a folder of them, in constant memory.

A row is `{"text": …, "meta": {…}}`, the form of The Pile, or has its other facts beside `text`. Nothing that is wrong
with a file passes in silence: a line that is no such row stops the reading, or is skipped, counted and reported.
"""

import gzip
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cratelab.corpora.documents import Document, require

_JSONL, _TEXT = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md", ".rst", ".raw")
_COMPRESSED = (".gz", ".zst")
_NAMES_OF_SPLITS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}


class MalformedLine(ValueError):
    """A line of a JSON-lines file that is no document; the message names file, line and reason."""


@dataclass(frozen=True)
class SkippedLine:
    """Where a line was skipped (lines count from 1), and why."""

    file: str
    line: int
    reason: str


class LocalDocuments:
    """The documents of a local file or folder; iterate as often as you like.

    Each row's `meta` is kept, with the row's other fields in it. `meta["domain"]` is the row's own, else its
    `pile_set_name`, else `domain`, else the name of the file without its endings.

    Args:
        path: a file, or a folder whose files are read in the order of their paths. Known are .jsonl (.ndjson, .json),
            .txt (.text, .md, .rst, .raw; one document a file), each also with .gz or .zst, and .parquet.
        split: "train", "validation" or "test": of a folder only the files that bear that name, such as `train.jsonl`,
            `val.jsonl.zst`, `train/00.jsonl` or `train-00000-of-00002.parquet`.
        on_error: "raise" stops at the first malformed line; "skip" goes on, and warns at the end of the file.
        text: the field that holds the text.
        domain: of documents that do not say.

    Attributes:
        n_skipped: lines skipped in the latest iteration.
        skipped: the first 100 of them.

    Raises:
        FileNotFoundError: there is no `path`, or no file of that split or a known kind below it.
        ValueError: an argument or the file's kind is unknown. While reading, with the file's name: `MalformedLine`;
            and ValueError for a compressed file that is damaged or cut off, which no choice skips.

    Empty lines are no documents and no errors.
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
        if split is not None and split not in _NAMES_OF_SPLITS:
            raise ValueError(f"split must be one of {', '.join(_NAMES_OF_SPLITS)}; got {split!r}")
        self.files = _find(Path(path), split)
        self.on_error, self.text, self.domain = on_error, text, domain
        self.n_skipped, self.skipped = 0, []

    def __iter__(self) -> Iterator[Document]:
        self.n_skipped, self.skipped = 0, []
        for file in self.files:
            kind = _kind(file)
            if kind == ".parquet":
                yield from self._read_parquet(file)
            elif kind in _JSONL:
                yield from self._read_lines(file)
            else:
                yield self._document(file, {self.text: _read_text(file)})

    def _read_lines(self, file: Path) -> Iterator[Document]:
        before = self.n_skipped
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                yield self._document(file, json.loads(line.decode("utf-8-sig").rstrip("\r\n")))
            except (ValueError, RecursionError) as error:  # of the decoders, and our own
                reason = f"is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
                self._malformed(file, number, reason)
        if n := self.n_skipped - before:
            mine = [skipped for skipped in self.skipped if skipped.file == str(file)]
            lines = ", ".join(str(skipped.line) for skipped in mine[:10]) + (", …" if n > 10 else "")
            what = f"{n} malformed lines skipped ({lines})" if mine else f"{n} malformed lines skipped"
            warnings.warn(f"{file}: {what}" + (f"; the first {mine[0].reason}" if mine else ""), stacklevel=2)

    def _malformed(self, file: Path, number: int, reason: str) -> None:
        if self.on_error == "raise":
            raise MalformedLine(
                f'{file}, line {number}: {reason}. Expected {{"{self.text}": "…"}}; mend the line, or pass '
                'on_error="skip" to leave such lines out and have them counted'
            ) from None
        self.n_skipped += 1
        if len(self.skipped) < 100:
            self.skipped.append(SkippedLine(str(file), number, reason))

    def _read_parquet(self, file: Path) -> Iterator[Document]:
        parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield self._document(file, row)
        except arrow.ArrowException as error:
            raise ValueError(f"{file} cannot be read as Parquet: {error}; copy or download it again") from error

    def _document(self, file: Path, row: object) -> Document:
        fallback = self.domain or file.name.split(".")[0]
        try:
            return as_document(row, self.text, fallback)
        except ValueError as error:
            if _kind(file) == ".parquet":
                raise ValueError(f"{file}: a row {error}") from None
            raise


def as_document(row: object, text: str = "text", domain: str | None = None) -> Document:
    """A document from a row of JSON, Parquet or the hub.

    Raises:
        ValueError: the row is no object, or its field `text` is missing or no string.
    """
    if not isinstance(row, dict):
        raise ValueError(f"holds no JSON object but {type(row).__name__}")
    if not isinstance(row.get(text), str):
        found = f"is {type(row[text]).__name__}" if text in row else f"is missing among {', '.join(map(str, row))}"
        raise ValueError(f"has no text: the field {text!r} {found}")
    facts = {key: value for key, value in row.items() if key not in (text, "meta")}
    facts |= row["meta"] if isinstance(row.get("meta"), dict) else {"meta": row.get("meta")}
    facts = {key: value for key, value in facts.items() if value is not None}
    facts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in facts.items()}
    facts["domain"] = facts.get("domain") or facts.get("pile_set_name") or domain or ""
    return Document(row[text], facts)


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _find(path: Path, split: str | None) -> list[Path]:
    known = (*_JSONL, *_TEXT, ".parquet")
    if path.is_file():
        if _kind(path) not in known:
            raise ValueError(f"{path} is of no known kind; known are {' '.join(known)}, also with .gz or .zst")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in known)
    if split is not None:
        files = [file for file in files if _NAMES_OF_SPLITS[split] & _names(file.relative_to(path))]
    if not files:
        what = "file" if split is None else f"file of the split {split!r}"
        raise FileNotFoundError(f"{path} holds no {what}; known are {' '.join(known)}, also with .gz or .zst")
    return files


def _names(file: Path) -> set[str]:
    """What a file may be called by: its folders, and its name up to the first dot or hyphen."""
    return {*file.parts[:-1], file.name.split(".")[0].split("-")[0]}


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _damage_named(file, lambda: f" after line {number}"), _open(file) as lines:
        for number, line in enumerate(lines, 1):
            yield number, line


def _read_text(file: Path) -> str:
    with _damage_named(file, lambda: ""), _open(file) as content:
        data = content.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}; convert it first") from error


@contextmanager
def _damage_named(file: Path, where: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # not the content: the file is gone, or may not be read
        raise ValueError(f"{file} is damaged or cut off{where()}: {error}; copy or download it again") from error


def _open(file: Path) -> BinaryIO:
    if file.suffix.lower() in _COMPRESSED and file.stat().st_size == 0:
        raise EOFError("it is empty, which no compressed file is")
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if file.suffix.lower() == ".zst":
        # Arrow's reader, since that of the package zstandard takes a file that is cut off for one that ends
        return io.BufferedReader(require("pyarrow").input_stream(str(file), compression="zstd"))
    return file.open("rb")
