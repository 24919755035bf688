"""Writing tokenised corpora: in parallel, in constant memory, and so that a kill at any moment loses one shard at most.

Documents are read by one thread and grouped into shards; each shard is tokenised and written by a thread of its own.
Threads suffice, and need no start-up nor copies of the text: tiktoken releases Python's lock while it encodes. A shard
is there when its record is, and every file is replaced whole; a second run reads the documents again, finds by their
hash the shards that are done, and makes the others.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np

from cratelab.arguments import check_whole
from cratelab.corpora.documents import Document, encode_utf8
from cratelab.corpora.token_store import (
    DTYPES,
    FORMAT,
    MANIFEST,
    UNFINISHED,
    TokenizedCorpus,
    check_shard,
    check_tokenizer,
    document_file,
    read_manifest,
    token_file,
    tokenizer_facts,
)
from cratelab.corpora.tokenizers import Tokenizer, encode_pieces
from cratelab.storage import locked, read_json, remove_leftovers, replacing, write_json


def tokenize(
    documents: Iterable[Document],
    folder: str | Path,
    tokenizer: Tokenizer,
    workers: int | None = None,
    shard_characters: int = 2**24,
    on_shard: Callable[[dict], None] | None = None,
) -> TokenizedCorpus:
    """Tokenise a corpus into `folder` and open it. Run again after a kill, it goes on; once done, it only opens.

    Args:
        documents: the corpus, in the same order each time. Of a finished corpus only the first shard is compared.
        folder: made if need be. Processes that call this at once wait for the first, then open what it made.
        tokenizer: closes each document by its `eot_token`.
        workers: threads that encode; the number of cores unless given.
        shard_characters: text that makes a shard. At most `workers + 2` shards' text is in memory; a corpus of
            hundreds of gigabytes wants larger shards, since the system limits how many files can be mapped.
        on_shard: called with the record of each shard, in order, once it is written: for a progress bar.

    Returns:
        The corpus, checked as by `TokenizedCorpus.open`.

    Raises:
        ValueError: there is no document; `folder` was begun with another tokenizer, shard size or corpus; or the
            tokenizer cannot encode a document, which is named, or gives a token that is not in its vocabulary.
        OSError: a file cannot be written. What was finished stays, and the next run goes on from there.
    """
    check_whole("shard_characters", shard_characters)
    if workers is not None:
        check_whole("workers", workers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        remove_leftovers(folder, "*")  # of a kill, since all who write hold the lock
        finished = _begun(folder, tokenizer, shard_characters)
        if finished:
            _check_first_shard(folder, documents, shard_characters)
        else:
            _build(documents, folder, tokenizer, workers or os.cpu_count() or 1, shard_characters, on_shard)
        return TokenizedCorpus.open(folder, tokenizer, checksums=finished)


def _begun(folder: Path, tokenizer: Tokenizer, shard_characters: int) -> bool:
    """Whether the corpus is finished; if it was not even begun, it now is."""
    for name in MANIFEST, UNFINISHED:
        if (file := folder / name).is_file():
            begun = read_manifest(file)
            check_tokenizer(file, begun, tokenizer)
            if begun["shard_characters"] != shard_characters:
                raise ValueError(
                    f"{file} was begun with shard_characters={begun['shard_characters']}, not {shard_characters}: "
                    "give the same, or another folder"
                )
            return name == MANIFEST
    facts = {"format": FORMAT, "tokenizer": tokenizer_facts(tokenizer), "shard_characters": shard_characters}
    write_json(folder / UNFINISHED, facts)
    return False


def _check_first_shard(folder: Path, documents: Iterable[Document], shard_characters: int) -> None:
    group = next(_groups(documents, shard_characters), [])
    if hashlib.sha256(_digests(group)).hexdigest() != read_manifest(folder / MANIFEST)["shards"][0]["text_sha256"]:
        raise ValueError(f"{folder} holds another corpus than the one given: remove it, or choose another folder")


def _build(
    documents: Iterable[Document],
    folder: Path,
    tokenizer: Tokenizer,
    workers: int,
    shard_characters: int,
    on_shard: Callable[[dict], None] | None,
) -> None:
    dtype = DTYPES[tokenizer.n_vocab > 2**16]
    shards, waiting, corpus_digest, stopped = [], deque(), hashlib.sha256(), Event()
    n_documents = 0

    def finish_one() -> None:
        shards.append(waiting.popleft().result())
        if on_shard:
            on_shard(shards[-1])

    with ThreadPoolExecutor(workers) as pool:
        try:
            for number, group in enumerate(_groups(documents, shard_characters)):
                digests = _digests(group)
                corpus_digest.update(digests)
                text_sha256 = hashlib.sha256(digests).hexdigest()
                make = _make_shard, folder, number, group, n_documents, text_sha256, tokenizer, dtype, stopped
                waiting.append(pool.submit(*make))
                n_documents += len(group)
                if len(waiting) > workers:
                    finish_one()
            while waiting:
                finish_one()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    if not shards:
        raise ValueError(f"the corpus for {folder} holds no document")
    ours = {name(folder, number) for number in range(len(shards)) for name in (token_file, document_file)}
    for file in {*folder.glob("*.tokens"), *folder.glob("*.documents")} - ours:
        file.unlink()  # of a larger corpus that was begun here
    manifest = {
        **read_manifest(folder / UNFINISHED),
        "dtype": dtype,
        "corpus_sha256": corpus_digest.hexdigest(),
        "n_tokens": sum(shard["n_tokens"] for shard in shards),
        "n_documents": sum(shard["n_documents"] for shard in shards),
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
    for file in [folder / UNFINISHED, *folder.glob("*.shard.json")]:
        file.unlink()


def _groups(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _make_shard(
    folder: Path,
    number: int,
    group: list[Document],
    first: int,
    text_sha256: str,
    tokenizer: Tokenizer,
    dtype: str,
    stopped: Event,
) -> dict:
    """The record of a shard, made unless it is there; `first` is the place of its first document in the corpus."""
    record_file = folder / f"{number:05}.shard.json"
    try:
        record = read_json(record_file)
        if record["text_sha256"] == text_sha256:
            check_shard(folder, number, record, dtype, tokenizer.n_vocab, checksums=True)
            return record
    except (OSError, ValueError, KeyError):
        pass  # not there, or not whole: made anew
    domains = sorted({document.meta.get("domain", "") for document in group})
    index = {domain: i for i, domain in enumerate(domains)}
    end = np.array([tokenizer.eot_token], dtype)
    pieces, table = [], np.empty((len(group), 2), "<u4")
    for place, (row, document) in enumerate(zip(table, group, strict=True), first):
        pieces += [_encode(tokenizer, document, place, stopped).astype(dtype), end]
        row[:] = len(pieces[-2]) + 1, index[document.meta.get("domain", "")]
    tokens = np.concatenate(pieces)
    for file, data in (token_file(folder, number), tokens), (document_file(folder, number), table):
        with replacing(file) as part:
            part.write_bytes(data)
    record = {
        "n_tokens": len(tokens),
        "n_documents": len(group),
        "domains": domains,
        "text_sha256": text_sha256,
        "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        "documents_sha256": hashlib.sha256(table).hexdigest(),
    }
    write_json(record_file, record)
    return record


def _encode(tokenizer: Tokenizer, document: Document, place: int, stopped: Event) -> np.ndarray:
    pieces = []
    try:
        for piece in encode_pieces(tokenizer, document.text):
            if stopped.is_set():
                raise InterruptedError("another shard failed, or the call was interrupted")
            pieces.append(piece)
        tokens = np.concatenate(pieces)
        if len(tokens) and tokens.max() >= tokenizer.n_vocab:
            raise ValueError(f"token {tokens.max()} is not in the vocabulary of {tokenizer.n_vocab}")
    except ValueError as error:
        known = ", ".join(f"{name} {value!r}" for name, value in document.meta.items() if name in ("domain", "path"))
        raise ValueError(
            f"document {place} of the corpus ({known}; it begins {document.text[:40]!r}) cannot be tokenised: {error}"
        ) from error
    return tokens


def _digests(group: list[Document]) -> bytes:
    """The SHA-256 of each document's domain and text, one after another: what the hashes of a corpus are made of."""
    digests = []
    for document in group:
        domain = encode_utf8(document.meta.get("domain", ""))
        digest = hashlib.sha256(len(domain).to_bytes(8, "big") + domain)
        digest.update(encode_utf8(document.text))
        digests.append(digest.digest())
    return b"".join(digests)
