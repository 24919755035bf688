"""Tokenised corpora: one long stream of integers, memory-mapped from shards that a manifest describes.

A folder holds for each shard `00000.tokens` (little-endian integers, every document closed by the end-of-text token)
and `00000.documents` (two uint32 a document: its number of tokens and the index of its domain), and `manifest.json`:
tokenizer, fingerprint of the corpus, counts, SHA-256 of every file. `cratelab.corpora.token_writer` writes it.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from cratelab.corpora.tokenizers import Tokenizer, fingerprint
from cratelab.storage import digest_of_file, read_json

FORMAT = "cratelab tokens 1"
DTYPES = "<u2", "<u4"
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"


class TokenizedCorpus:
    """A stream of tokens, with the documents that it is made of. Of the arrays only what is read is in memory.

    Args:
        shards: the stream, (n,) unsigned integers a shard; no document reaches into the next.
        documents: (m, 2) for each shard: tokens of each document, its end of text included, and index of its domain.
        domains: for each shard the names that these indices stand for.
        n_vocab: tokens are 0 to n_vocab - 1.
        manifest: what is known of where it comes from.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        documents: Sequence[np.ndarray],
        domains: Sequence[Sequence[str]],
        n_vocab: int,
        manifest: dict | None = None,
    ):
        self.n_vocab, self.manifest = n_vocab, manifest or {}
        self._shards, self._documents, self._domains = shards, documents, domains
        self._token_ends = np.cumsum([len(shard) for shard in shards])
        self._document_ends = np.cumsum([len(table) for table in documents])
        self._starts_in = lru_cache(maxsize=4)(self._compute_starts)

    @classmethod
    def from_arrays(cls, tokens: np.ndarray, document: np.ndarray, domains: Sequence[str], n_vocab: int) -> Self:
        """A corpus that is in memory, such as TinyWorld's.

        Args:
            tokens: (n,) integers.
            document: (n,) the document of each token: 0 for those of the first, then 1, …
            domains: the domain of each document.
            n_vocab: tokens are 0 to n_vocab - 1.

        Raises:
            ValueError: the arrays do not fit one another or `n_vocab`.
        """
        tokens, document = np.asarray(tokens), np.asarray(document)
        if not all(array.dtype.kind in "iu" and (array >= 0).all() for array in (tokens, document)):
            raise ValueError(f"tokens and document must be integers, at least 0; got {tokens.dtype}, {document.dtype}")
        if (tokens >= n_vocab).any():
            raise ValueError(f"tokens must be below n_vocab = {n_vocab}; got {tokens.max()}")
        n_documents = int(document.max()) + 1 if document.size else 0
        if (
            tokens.ndim != 1
            or tokens.shape != document.shape
            or (document[1:] < document[:-1]).any()
            or n_documents != len(domains)
        ):
            raise ValueError(
                "tokens and document must be (n,) each, document ascending, with a domain for each; got "
                f"{tokens.shape}, {document.shape}, {n_documents} documents and {len(domains)} domains"
            )
        lengths = np.bincount(document.astype(np.int64))
        names = sorted(set(domains))
        table = np.stack([lengths, [names.index(domain) for domain in domains]], 1)
        return cls([tokens], [table], [names], n_vocab, {"n_tokens": len(tokens), "n_documents": len(domains)})

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None, checksums: bool = True) -> Self:
        """The corpus that was written into `folder`, after checking that it is whole.

        Args:
            folder: where `cratelab.corpora.token_writer.tokenize` wrote.
            tokenizer: the one that the reader will use; the corpus must be made with it.
            checksums: read every file, compare its SHA-256, and see that every token is one of the vocabulary's;
                without, sizes only (for hundreds of gigabytes).

        Raises:
            FileNotFoundError: there is no corpus in `folder`, or a file of it is missing.
            ValueError: the corpus is unfinished, of another tokenizer or of another format, or a file is not what was
                written. Each message names the file, and what to do.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            if (folder / UNFINISHED).is_file():
                raise ValueError(f"{folder} is unfinished: tokenize into it again, which goes on where it stopped")
            raise FileNotFoundError(f"{folder} holds no tokenised corpus: there is no {MANIFEST} in it")
        manifest = read_manifest(folder / MANIFEST)
        if tokenizer is not None:
            check_tokenizer(folder / MANIFEST, manifest, tokenizer)
        shards, n_vocab = manifest["shards"], manifest["tokenizer"]["n_vocab"]
        opened = [
            check_shard(folder, i, shard, manifest["dtype"], n_vocab, checksums) for i, shard in enumerate(shards)
        ]
        if token_file(folder, len(shards)).exists():
            raise ValueError(
                f"{folder} holds more than the {len(shards)} shards of {MANIFEST}: copy both again, or tokenize again"
            )
        tokens, tables = zip(*opened, strict=True)
        return cls(tokens, tables, [shard["domains"] for shard in shards], n_vocab, manifest)

    def __len__(self) -> int:
        return int(self._token_ends[-1])

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """Tokens of the whole stream, as they are stored: a read-only view, or a copy where shards meet.

        Raises:
            IndexError: an integer is out of range.
            ValueError: a slice has a step.
        """
        if not isinstance(index, slice):
            position = range(len(self))[index]
            return self[position : position + 1][0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"only slices without a step can be read from a stream; got {index}")
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self._token_ends, start, side="right"))
            offset = int(self._token_ends[shard]) - len(self._shards[shard])
            pieces.append(self._shards[shard][start - offset : stop - offset])
            start = min(stop, int(self._token_ends[shard]))
        return pieces[0] if len(pieces) == 1 else np.concatenate([self._shards[0][:0], *pieces])

    def facts(self) -> dict:
        """Size and identity for the record of a run: n_tokens, n_documents, n_vocab, and a SHA-256 of the tokens."""
        digest = hashlib.sha256()
        for number, shard in enumerate(self._shards):
            known = self.manifest.get("shards")  # on disk the hash of each shard is known
            digest.update(known[number]["tokens_sha256"].encode() if known else np.asarray(shard, "<u4").tobytes())
        sizes = dict(n_tokens=len(self), n_documents=self.n_documents, n_vocab=self.n_vocab)
        return sizes | {"sha256": digest.hexdigest()}

    @property
    def n_documents(self) -> int:
        return int(self._document_ends[-1])

    def lengths(self) -> np.ndarray:
        """(n_documents,) int64, tokens of each document."""
        return np.concatenate([table[:, 0] for table in self._documents]).astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        """Tokens of a document, its end of text included."""
        start, stop = self.document_span(index)
        return self[start:stop]

    def document_span(self, index: int) -> tuple[int, int]:
        """Where a document starts in the stream, and where the next one does.

        Raises:
            IndexError: there is no such document.
        """
        shard, row = self._row(index)
        starts = self._starts_in(shard)
        return int(starts[row]), int(starts[row + 1])

    def domain(self, index: int) -> str:
        """The domain of a document.

        Raises:
            IndexError: there is no such document.
        """
        shard, row = self._row(index)
        return self._domains[shard][self._documents[shard][row, 1]]

    def random_windows(self, n: int, length: int, seed: int | Sequence[int]) -> np.ndarray:
        """Windows that start anywhere, over the ends of documents too: (n, length) int64.

        Args:
            n: windows.
            length: tokens in each; one more than the model's context, if targets are to be cut from them.
            seed: whatever `numpy.random.default_rng` takes: `[seed, step]` gives each training step its own
                windows, the same after a resume, with no state to keep.

        Raises:
            ValueError: the stream is shorter than a window.
        """
        self._check_length(length)
        starts = np.random.default_rng(seed).integers(len(self) - length + 1, size=n)
        return self._windows(starts, length)

    def validation_windows(self, length: int, n: int | None = None) -> np.ndarray:
        """Fixed windows that do not overlap, all there are or `n` evenly spread ones: (n, length) int64.

        Raises:
            ValueError: the stream has not so many windows.
        """
        self._check_length(length)
        all_of_them = len(self) // length
        n = all_of_them if n is None else n
        if not 1 <= n <= all_of_them:
            raise ValueError(f"{len(self)} tokens have 1 to {all_of_them} windows of {length}; asked for {n}")
        return self._windows(np.arange(n) * all_of_them // n * length, length)

    def _windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        windows = np.empty((len(starts), length), np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            window[:] = self[start : start + length]
        return windows

    def _check_length(self, length: int) -> None:
        if not 1 <= length <= len(self):
            raise ValueError(f"a window of {length} tokens does not fit a corpus of {len(self)}")

    def _row(self, index: int) -> tuple[int, int]:
        index = range(self.n_documents)[index]
        shard = int(np.searchsorted(self._document_ends, index, side="right"))
        return shard, index - int(self._document_ends[shard]) + len(self._documents[shard])

    def _compute_starts(self, shard: int) -> np.ndarray:
        """Where the shard's documents start in the stream, and where the last one ends."""
        lengths = self._documents[shard][:, 0].astype(np.int64)
        return int(self._token_ends[shard]) - len(self._shards[shard]) + np.concatenate([[0], np.cumsum(lengths)])


def token_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.tokens"


def document_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.documents"


def tokenizer_facts(tokenizer: Tokenizer) -> dict:
    """What a manifest says of the tokenizer."""
    names = "name", "n_vocab", "eot_token"
    return {name: getattr(tokenizer, name) for name in names} | {"sha256": fingerprint(tokenizer)}


def read_manifest(file: Path) -> dict:
    """A manifest, or what stands in its place until the corpus is finished.

    Raises:
        ValueError: the file is no manifest of this format, or is not whole.
    """
    try:
        manifest = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; remove {file.parent} and tokenize again") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is no manifest of the format {FORMAT!r}; choose another folder, or tokenize again")
    tokenizer, shards = manifest.get("tokenizer"), manifest.get("shards")
    wrong = []
    if not _has(tokenizer, name=str, n_vocab=int, eot_token=int, sha256=str) or not (
        0 <= tokenizer["eot_token"] < tokenizer["n_vocab"]
    ):
        wrong.append("tokenizer")
    elif file.name == MANIFEST and manifest.get("dtype") not in DTYPES[tokenizer["n_vocab"] > 2**16 :]:
        wrong.append("dtype")
    if not _has(manifest, shard_characters=int):
        wrong.append("shard_characters")
    if file.name == MANIFEST and not (isinstance(shards, list) and shards and all(map(_is_shard, shards))):
        wrong.append("shards")
    elif file.name == MANIFEST:
        for name in "n_tokens", "n_documents":
            if manifest.get(name) != sum(shard[name] for shard in shards):
                wrong.append(f"{name}, which is not the sum over the {len(shards)} shards")
    if wrong:
        raise ValueError(
            f"{file} is not as it was written: wrong {', '.join(wrong)}; copy it again, or remove {file.parent} and "
            "tokenize again"
        )
    return manifest


def _has(content: object, **types: type) -> bool:
    return isinstance(content, dict) and all(type(content.get(name)) is kind for name, kind in types.items())


def _is_shard(shard: object) -> bool:
    digests = "text_sha256", "tokens_sha256", "documents_sha256"
    return (
        _has(shard, domains=list, n_tokens=int, n_documents=int, **dict.fromkeys(digests, str))
        and 1 <= shard["n_documents"] <= shard["n_tokens"]
        and all(re.fullmatch("[0-9a-f]{64}", shard[name]) for name in digests)
        and shard["domains"]
        and all(isinstance(domain, str) for domain in shard["domains"])
    )


def check_tokenizer(file: Path, manifest: dict, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the manifest in `file` names another tokenizer."""
    theirs, ours = manifest["tokenizer"], tokenizer_facts(tokenizer)
    if {**theirs, "name": ""} != {**ours, "name": ""}:
        raise ValueError(
            f"{file} is of the tokenizer {theirs['name']!r} ({theirs['n_vocab']} tokens, sha256 "
            f"{theirs['sha256'][:12]}…), not {ours['name']!r} ({ours['n_vocab']}, {ours['sha256'][:12]}…): load the "
            "tokenizer that it was made with, or tokenize into another folder"
        )


def check_shard(
    folder: Path, number: int, shard: dict, dtype: str, n_vocab: int, checksums: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the table of documents of a shard, mapped.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not those that `shard` describes.
    """
    remedy = f"copy it again, or remove {folder} and tokenize again"
    if not _is_shard(shard):
        raise ValueError(f"shard {number} in {folder} is not described as it was written; {remedy}")
    mapped = []
    for file, kind, shape, digest in [
        (token_file(folder, number), dtype, (shard["n_tokens"],), shard["tokens_sha256"]),
        (document_file(folder, number), "<u4", (shard["n_documents"], 2), shard["documents_sha256"]),
    ]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {remedy}")
        size = math.prod(shape) * np.dtype(kind).itemsize
        if (found := file.stat().st_size) != size:
            raise ValueError(f"{file} has {found} bytes, expected {size}; {remedy}")
        if checksums and digest_of_file(file) != digest:
            raise ValueError(f"{file} is not what was written (its SHA-256 differs); {remedy}")
        mapped.append(np.memmap(file, kind, "r", shape=shape))
    tokens, table = mapped
    if checksums:
        if (largest := int(tokens.max())) >= n_vocab:
            raise ValueError(
                f"{token_file(folder, number)} holds token {largest} of a vocabulary of {n_vocab}; {remedy}"
            )
        lengths, domains = table.T.astype(np.int64)
        if lengths.sum() != len(tokens) or domains.max() >= len(shard["domains"]):
            raise ValueError(f"{document_file(folder, number)} does not fit the tokens and domains; {remedy}")
    return tokens, table
