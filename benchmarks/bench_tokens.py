"""Tokenising a corpus to disk against tiktoken's own batch encoding, which keeps lists in memory and writes nothing.

The peer is `Encoding.encode_ordinary_batch` with as many threads. Ours also groups the documents, hashes the text,
joins, writes, syncs and checks; the aim is 0.9 of the peer's rate. Text is Python's documentation, or local files.

    python benchmarks/bench_tokens.py                     32 million characters of Python's documentation
    python benchmarks/bench_tokens.py --files FOLDER      of local files, as cratelab.corpora.files reads them
    python benchmarks/bench_tokens.py --toy               seconds, to see that it runs
"""

import argparse
import os
import tempfile
from collections.abc import Iterable
from itertools import count

from bench_core import seconds

from cratelab.corpora import pydocs, tokenizers
from cratelab.corpora.documents import Document
from cratelab.corpora.files import LocalDocuments
from cratelab.corpora.token_writer import tokenize


def first_characters(documents: Iterable[Document], n: int) -> list[Document]:
    taken = []
    for document in documents:
        taken.append(document)
        n -= len(document.text)
        if n <= 0:
            break
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--files")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    n = 10**6 if arguments.toy else 32 * 10**6
    source = LocalDocuments(arguments.files, "train") if arguments.files else pydocs.standard_library()
    documents = first_characters(source, n)
    total = sum(len(document.text) for document in documents)
    documents *= -(-n // total)  # the library's documentation is shorter than that: over and over
    texts = [document.text for document in documents]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encodings = [tokenizers.byte_encoding(), tokenizers.train_bpe(documents[: len(documents) // 4 + 1], 4096)]
    try:
        encodings.append(tokenizers.gpt2())
    except ConnectionError as error:
        print(f"without GPT-2's tokens: {error}")
    print(f"{megabytes:.1f} MB in {len(texts)} documents, {arguments.workers} threads")
    print(f"{'':20}{'ours':>12}{'peer':>12}   ours/peer")
    with tempfile.TemporaryDirectory() as folder:
        number = count()
        for encoding in encodings:

            def ours(encoding=encoding):
                tokenize(documents, f"{folder}/{next(number)}", encoding, arguments.workers)

            def peer(encoding=encoding):
                encoding.encode_ordinary_batch(texts, num_threads=arguments.workers)

            mine, theirs = (megabytes / seconds(call) for call in (ours, peer))
            print(f"{encoding.name:20}{mine:8.1f}MB/s{theirs:8.1f}MB/s   {mine / theirs:8.2f}")


if __name__ == "__main__":
    main()
