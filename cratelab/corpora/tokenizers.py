"""Tokenizers: GPT-2's, a byte-level BPE trained on a corpus, bytes, and whole words.

All but the last are a `tiktoken.Encoding`, the last has the same few methods, and each can be saved as JSON. What a
tokenizer has to offer is said by `Tokenizer`.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cratelab.corpora.documents import Document
from cratelab.extras import require
from cratelab.storage import digest_of, read_json, write_text

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"

# Words with the space before them, numbers, punctuation, the rest of the white space: GPT-2's pattern, in the form
# that tiktoken runs fastest.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Bytes in pieces of bounded length, only because tiktoken is slower on longer ones; no merge depends on where they end.
_BYTES_PATTERN = r"[\s\S]{1,400}"

LONGEST_PIECE = 4096  # characters
LARGEST_VOCABULARY = 2**20

# All up to the last place in a text at which GPT-2's pattern always cuts: before white space, before ASCII's or East
# Asian punctuation after a letter or digit, and between letter and digit. It never looks behind, nor past white space.
_UP_TO_A_CUT = re.compile(
    r"[\s\S]*(?:\S(?=[ \n\r\t])|[^\W_](?=[!-/:-@\[-`{-~、。，！？：；「」])|[a-zA-Z](?=[0-9])|[0-9](?=[a-zA-Z]))"
)


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
            "that variable set; or train a tokenizer: cratelab.corpora.tokenizers.train_bpe"
        ) from error


def byte_encoding() -> "tiktoken.Encoding":
    """256 bytes and the end of text: the trivial tokenizer, 257 tokens."""
    return _encoding("bytes", _BYTES_PATTERN, [bytes([value]) for value in range(256)])


def train_bpe(documents: Iterable[Document], vocab_size: int = 4096) -> "tiktoken.Encoding":
    """A byte-level BPE (eq-06-7) of the corpus by GPT-2's recipe, trained by Hugging Face `tokenizers`.

    Args:
        documents: what to train on: the split "train" only.
        vocab_size: all tokens: 256 bytes, the merges, and the end of text, which is the last.

    Raises:
        ValueError: `vocab_size` is not 257 to 1,048,576, or the corpus has too few different words for so many tokens.

    Text is cut as by `pieces`, since the library's time grows with the square of a word's length.
    """
    trained = train_library_bpe((document.text for document in documents), vocab_size)
    return from_library(trained, f"bpe-{vocab_size}")


def train_library_bpe(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """The tokenizer that `train_bpe` wraps, as the library's own object.

    Raises:
        ValueError: as `train_bpe`.
    """
    if not 257 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be 257, for 256 bytes and the end of text, to {LARGEST_VOCABULARY:,}; got {vocab_size}"
        )
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
    stopped = Event()

    def read() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                return
            # a lone surrogate is no text to the library
            yield from pieces(text.encode("utf8", "replace").decode())

    _interruptibly(lambda: tokenizer.train_from_iterator(read(), trainer), stopped)
    if (found := tokenizer.get_vocab_size()) < vocab_size - 1:
        raise ValueError(
            f"the corpus gives only {found + 1} tokens that occur twice, not {vocab_size}; "
            f"take more text or a smaller vocabulary, such as bpe-{found + 1} or bytes"
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
    byte_of = {character: byte for byte, character in byte_characters().items()}
    tokens = sorted(model["vocab"].keys() - {END_OF_TEXT}, key=model["vocab"].get)
    merged = ["".join(pair) for pair in model["merges"]]
    if tokens[256:] != merged or [model["vocab"][token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the tokens must be 256 bytes, then one for each merge in order, then the end of text")
    return _encoding(name, GPT2_PATTERN, [bytes(byte_of[character] for character in token) for token in tokens])


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """`encode_ordinary` as a (n,) uint32 array, in time that is linear in the text whatever it is.

    The text of a tokenizer with GPT-2's pattern, or of bytes, is cut as by `pieces`, so that the tokens may be others
    than `encode_ordinary`'s only in a run without end.

    Raises:
        ValueError: the tokenizer cannot encode it, such as where a library gives up on its pattern.
    """
    return np.concatenate(list(encode_pieces(tokenizer, text)))


def encode_pieces(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
    """What `encode` joins, for those who have to stop in between."""
    cut = getattr(tokenizer, "_pat_str", None) in (GPT2_PATTERN, _BYTES_PATTERN)
    return (_encode_piece(tokenizer, piece) for piece in (pieces(text) if cut else [text]))


def pieces(text: str) -> Iterator[str]:
    """A text cut into pieces of at most 4,096 characters, where GPT-2's pattern cuts it too.

    tiktoken and `tokenizers` need time, and stack, that grow with the square of what their patterns leave whole, and
    neither can be interrupted meanwhile. Only a run of 4,096 characters without a place to cut, such as one of spaces
    or of one letter, is cut where it is.
    """
    start = 0
    while len(text) - start > LONGEST_PIECE:
        cut = _UP_TO_A_CUT.match(text, start, start + LONGEST_PIECE)
        end = cut.end() if cut else start + LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _encode_piece(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        if hasattr(tokenizer, "encode_to_numpy"):
            try:
                return tokenizer.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:  # a lone surrogate, which encode_ordinary replaces
                pass
        return np.array(tokenizer.encode_ordinary(text), np.uint32)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tiktoken, which derives from no Exception
            raise
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} gave up on {len(text)} characters that begin {text[:40]!r}: {error}"
        ) from error


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides which tokens a text becomes; not of the name."""
    return digest_of({key: value for key, value in _facts(tokenizer).items() if key != "name"})


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer of this module as JSON, whole or not at all.

    Raises:
        OSError: it cannot be written.
        ValueError: the tokenizer is none of this module's kinds.
    """
    write_text(path, json.dumps(_facts(tokenizer), indent=0) + "\n")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no tokenizer, or one that does not give every text back.
    """
    try:
        facts = read_json(path)
        if missing := [key for key in ("kind", "name", "tokens", "end_of_text") if key not in facts]:
            theirs = "it is one of the library tokenizers" if "model" in facts else f"it lacks {', '.join(missing)}"
            raise ValueError(f"{theirs}: give the tokenizer.json of a run")
        kind, names, end = facts["kind"], facts["tokens"], facts["end_of_text"]
        strings = [facts["name"], end, *names, *([facts["pattern"]] if kind == "bytes" else [])]
        if not isinstance(names, list) or not all(isinstance(string, str) for string in strings):
            raise ValueError("tokens must be a list of strings, and all else a string")
        if len(names) > LARGEST_VOCABULARY:
            raise ValueError(f"{len(names)} tokens are more than {LARGEST_VOCABULARY}")
        if kind == "words":
            return WordEncoding(names, end)
        if kind != "bytes" or end != END_OF_TEXT:
            raise ValueError(f"unknown kind {kind!r} or end of text {end!r}")
        encoding = _encoding(
            facts["name"], facts["pattern"], [base64.b64decode(token, validate=True) for token in names]
        )
        if facts["pattern"] not in (GPT2_PATTERN, _BYTES_PATTERN):
            _check_pattern(encoding)
        return encoding
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} holds no tokenizer that cratelab.corpora.tokenizers.save wrote: {error!r}") from error


def _check_pattern(encoding: "tiktoken.Encoding") -> None:
    """Raises ValueError if a pattern leaves text out, or is more than tiktoken can do."""
    text = (
        " ".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000)))) + "Don't  stop 1999 \n\n" + "a" * 200 + " " * 200
    )
    if encoding.decode(encode(encoding, text).tolist()) != text:
        raise ValueError("its pattern leaves characters out")


def _interruptibly(call: Callable[[], None], stopped: Event) -> None:
    """Run what is deaf to Ctrl-C in a thread of its own, which an interruption leaves behind with `stopped` set."""
    raised = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    finally:
        stopped.set()
    if raised:
        raise raised[0]


def _facts(tokenizer: Tokenizer) -> dict:
    if isinstance(tokenizer, WordEncoding):
        end = tokenizer.vocabulary[tokenizer.eot_token]
        return {"kind": "words", "name": tokenizer.name, "tokens": tokenizer.vocabulary, "end_of_text": end}
    if not hasattr(tokenizer, "_mergeable_ranks"):
        raise ValueError(
            f"{tokenizer.name!r} is no tokenizer of cratelab.corpora.tokenizers, but {type(tokenizer).__name__}"
        )
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


def byte_characters() -> dict[int, str]:
    """The character of each byte in `tokenizers`: printable ones stand for themselves, the others follow in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    in_order = printable + [value for value in range(256) if value not in printable]
    return dict(zip(in_order, sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet()), strict=True))
