"""Tokenizers: GPT-2's, a byte-level BPE trained on a corpus, bytes, and whole words.

All but the last are a `tiktoken.Encoding`, the last has the same few methods, and each can be saved as JSON. What a
tokenizer has to offer is said by `Tokenizer`.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cratelab.corpora.documents import Document, require

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"

# Words with the space before them, numbers, punctuation, the rest of the white space: GPT-2's pattern, in the form
# that tiktoken runs fastest.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer(Protocol):
    """What the corpora ask of a tokenizer.

    Attributes:
        name: for people.
        n_vocab: tokens are 0 to n_vocab - 1.
        eot_token: the token that ends every document.
    """

    name: str
    n_vocab: int
    eot_token: int

    def encode_ordinary(self, text: str) -> list[int]:
        """Tokens of a text; the name of a special token in it is text like any other."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""


class WordEncoding:
    """Words parted by white space, for corpora whose vocabulary is a list of words, such as TinyWorld's.

    Args:
        vocabulary: the words; a word's place is its token.
        end_of_text: the word that ends a document; appended to the vocabulary if it is not there.

    Raises:
        ValueError: a word stands twice, is empty or holds white space.
    """

    name = "words"

    def __init__(self, vocabulary: Sequence[str], end_of_text: str = END_OF_TEXT):
        self.vocabulary = [*vocabulary, *([] if end_of_text in vocabulary else [end_of_text])]
        self._index = {word: token for token, word in enumerate(self.vocabulary)}
        wrong = [word for i, word in enumerate(self.vocabulary) if word.split() != [word] or self._index[word] != i]
        if wrong:
            raise ValueError(f"words must differ, and hold no white space; got {', '.join(map(repr, wrong[:5]))}")
        self.n_vocab, self.eot_token = len(self.vocabulary), self._index[end_of_text]

    def encode_ordinary(self, text: str) -> list[int]:
        """Tokens of a text's words.

        Raises:
            ValueError: a word is not in the vocabulary.
        """
        words = text.split()
        if unknown := sorted(set(words) - self._index.keys()):
            raise ValueError(
                f"{len(unknown)} words are not among the {self.n_vocab} of the vocabulary, such as "
                f"{', '.join(map(repr, unknown[:5]))}; take a byte-level tokenizer for open text"
            )
        return [self._index[word] for word in words]

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of tokens, a space between."""
        return " ".join(self.vocabulary[token] for token in tokens)


def gpt2() -> "tiktoken.Encoding":
    """GPT-2's 50,257 tokens, the paper's. tiktoken downloads 1.5 MB the first time and keeps them.

    Raises:
        ConnectionError: there is neither a network nor a copy on this machine; the message says what to do.
    """
    tiktoken = require("tiktoken")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' errors derive from it
        raise ConnectionError(
            f"GPT-2's tokens are not on this machine and cannot be downloaded: {error}. Connect it once; or set "
            "TIKTOKEN_CACHE_DIR to a folder copied from a machine where tiktoken.get_encoding('gpt2') has run with "
            "that variable set; or train a tokenizer: cratelab.corpora.tokens.train_bpe"
        ) from error


def byte_encoding() -> "tiktoken.Encoding":
    """256 bytes and the end of text: the trivial tokenizer, 257 tokens."""
    # Pieces of bounded length only because tiktoken is slower on longer ones; no merge depends on where they end.
    return _encoding("bytes", r"[\s\S]{1,400}", [bytes([value]) for value in range(256)])


def train_bpe(documents: Iterable[Document], vocab_size: int = 4096) -> "tiktoken.Encoding":
    """A byte-level BPE (eq-06-4) of the corpus by GPT-2's recipe, trained by Hugging Face `tokenizers`.

    Args:
        documents: what to train on: the split "train" only.
        vocab_size: all tokens: 256 bytes, the merges, and the end of text, which is the last.

    Raises:
        ValueError: `vocab_size` is below 257, or the corpus has too few different words for so many tokens.
    """
    trained = train_library_bpe((document.text for document in documents), vocab_size)
    return from_library(trained, f"bpe-{vocab_size}")


def train_library_bpe(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """The tokenizer that `train_bpe` wraps, as the library's own object.

    Raises:
        ValueError: as `train_bpe`.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must hold 256 bytes and the end of text; got {vocab_size}")
    library = require("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # a lone surrogate is no text to the library
    tokenizer.train_from_iterator((text.encode("utf8", "replace").decode() for text in texts), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size - 1:
        raise ValueError(
            f"the corpus gives only {found + 1} tokens that occur twice, not {vocab_size}; "
            "take more text or a smaller vocabulary"
        )
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def from_library(tokenizer: "tokenizers.Tokenizer", name: str) -> "tiktoken.Encoding":
    """A byte-level BPE of Hugging Face `tokenizers`, with GPT-2's pattern, as a `tiktoken.Encoding` of equal ids.

    tiktoken merges the pair whose result has the lowest id. That is the library's order, which is by merge, exactly if
    merge i makes token 256 + i; this is checked.

    Raises:
        ValueError: the tokenizer is none of that kind.
    """
    model = json.loads(tokenizer.to_str())["model"]
    alphabet = require("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    byte_of = dict(zip(sorted(alphabet), _bytes_in_gpt2_order(), strict=True))
    tokens = sorted(model["vocab"].keys() - {END_OF_TEXT}, key=model["vocab"].get)
    merged = ["".join(pair) for pair in model["merges"]]
    if tokens[256:] != merged or [model["vocab"][token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the tokens must be 256 bytes, then one for each merge in order, then the end of text")
    return _encoding(name, GPT2_PATTERN, [bytes(byte_of[character] for character in token) for token in tokens])


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """`encode_ordinary` as a (n,) uint32 array, by tiktoken's faster way where there is one."""
    if hasattr(tokenizer, "encode_to_numpy"):
        try:
            return tokenizer.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which encode_ordinary replaces
            pass
    return np.array(tokenizer.encode_ordinary(text), np.uint32)


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides which tokens a text becomes; not of the name."""
    facts = {key: value for key, value in _facts(tokenizer).items() if key != "name"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer of this module as JSON, whole or not at all."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(_facts(tokenizer), indent=0) + "\n", encoding="utf8")
    os.replace(part, path)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no tokenizer.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf8"))
        if facts["kind"] == "words":
            return WordEncoding(facts["tokens"], facts["end_of_text"])
        if facts["kind"] != "bytes" or facts["end_of_text"] != END_OF_TEXT:
            raise ValueError(f"unknown kind {facts['kind']!r} or end of text {facts['end_of_text']!r}")
        tokens = [base64.b64decode(token, validate=True) for token in facts["tokens"]]
        return _encoding(facts["name"], facts["pattern"], tokens)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no tokenizer that cratelab.corpora.tokens.save wrote: {error!r}") from error


def _facts(tokenizer: Tokenizer) -> dict:
    if isinstance(tokenizer, WordEncoding):
        end = tokenizer.vocabulary[tokenizer.eot_token]
        return {"kind": "words", "name": tokenizer.name, "tokens": tokenizer.vocabulary, "end_of_text": end}
    # tiktoken's documentation names these three as the way to extend an encoding
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    tokens = sorted(ranks, key=ranks.get)
    if special != {END_OF_TEXT: len(tokens)} or [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"{tokenizer.name}: only tokens 0, 1, …, with {END_OF_TEXT} the last and only special one")
    return {
        "kind": "bytes",
        "name": tokenizer.name,
        "pattern": tokenizer._pat_str,
        "tokens": [base64.b64encode(token).decode() for token in tokens],
        "end_of_text": END_OF_TEXT,
    }


def _encoding(name: str, pattern: str, tokens: list[bytes]) -> "tiktoken.Encoding":
    """An encoding whose token i is `tokens[i]`, and whose last is the end of text."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or not {bytes([value]) for value in range(256)} <= ranks.keys():
        raise ValueError("the tokens must differ and hold every single byte")
    return require("tiktoken").Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)}
    )


def _bytes_in_gpt2_order() -> list[int]:
    """The byte of each character of GPT-2's alphabet: printable ones for themselves, then the others in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [value for value in range(256) if value not in printable]
