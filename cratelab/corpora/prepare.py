"""Corpora by name, ready for training: tokenised once, kept in a cache, split into training and validation.

| name | what | tokens |
|---|---|---|
| `tinyworld` | generated, labelled, with known entropy | words |
| `pydocs` | documentation of Python's standard library | BPE of 4,096 |
| `packages` | documentation and comments of installed scientific packages | BPE of 4,096 |
| `wikitext`, `tinystories`, `pile` | from the Hugging Face hub | GPT-2's |
| a file or folder | JSON lines, Parquet or text, as `cratelab.corpora.files` reads them | BPE of 4,096 |
| a folder of tokens | `train` and `validation` as an earlier call left them in its cache | its own |

Several of text are joined by `+`: `pydocs+packages`.
"""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from cratelab.corpora import hub, pydocs, tinyworld, tokens
from cratelab.corpora.documents import Document, require, select
from cratelab.corpora.files import LocalDocuments
from cratelab.corpora.tokenized import MANIFEST, TokenizedCorpus, read_manifest
from cratelab.corpora.tokenizing import tokenize

_HUB = {"wikitext": hub.wikitext, "tinystories": hub.tiny_stories, "pile": hub.pile}
_PYTHON = {"pydocs": pydocs.standard_library, "packages": pydocs.packages}
_SPLITS = "train", "validation"
NAMES = "tinyworld", *_PYTHON, *_HUB


@dataclass
class PreparedCorpus:
    """What training needs.

    Attributes:
        training: the tokens to learn from.
        validation: the tokens to be judged on.
        tokenizer: what made them.
        world: the validation text with its labels, where it is TinyWorld.
    """

    training: TokenizedCorpus
    validation: TokenizedCorpus
    tokenizer: tokens.Tokenizer
    world: tinyworld.World | None = None

    @property
    def floor(self) -> float | None:
        """Nats a token that no model can go below on the validation text, where it is known."""
        return self.world and self.world.entropy_rate


def prepare(
    name: str,
    tokenizer: str | None = None,
    characters: int = 200_000_000,
    context: int = 512,
    cache: str | Path | None = None,
) -> PreparedCorpus:
    """A corpus by its name, from the cache where it has been made before.

    Args:
        name: see the table above.
        tokenizer: "words" (TinyWorld's), "bytes", "gpt2", or "bpe-N": a byte-level BPE of N tokens trained on the
            training text. The table's unless given.
        characters: of training text, at most; validation takes at most a twentieth. TinyWorld's size is two million
            tokens at most.
        context: longest document of TinyWorld, so that a model's window can hold it.
        cache: folder for the tokens; the environment's `CRATELAB_CACHE`, or ~/.cache/cratelab, unless given.

    Raises:
        ValueError: there is no corpus or tokenizer of that name.
        FileNotFoundError: a path does not exist, or holds no text.
        ConnectionError: a corpus of the hub is not on this machine, and the hub cannot be reached.
    """
    parts, tokenizer = _check_names(name, tokenizer)
    if tokenizer == "words":
        return _tinyworld(min(2_000_000, characters // 5), context)
    if _holds_tokens(name):
        encoding = tokens.load(Path(name) / "tokenizer.json")
        return PreparedCorpus(*(TokenizedCorpus.open(Path(name) / split, encoding) for split in _SPLITS), encoding)
    folder = _cache_folder(parts, tokenizer, characters, cache)
    encoding = _tokenizer(tokenizer, parts, characters, folder)
    corpora = []
    for split, limit in zip(_SPLITS, (characters, characters // 20), strict=True):
        if (folder / split / MANIFEST).is_file():
            corpora.append(TokenizedCorpus.open(folder / split, encoding))
            continue
        with tqdm(desc=f"{name}: {split} tokens", unit="token", unit_scale=True, disable=None) as bar:
            documents = _first(_documents(parts, split), limit)
            done = tokenize(documents, folder / split, encoding, on_shard=lambda shard: bar.update(shard["n_tokens"]))
            corpora.append(done)
    return PreparedCorpus(*corpora, encoding)


def vocabulary_size(name: str, tokenizer: str | None = None) -> int:
    """How many tokens `prepare(name, tokenizer)` will tell apart; nothing is read.

    Raises:
        ValueError: there is no corpus or tokenizer of that name.
    """
    _, tokenizer = _check_names(name, tokenizer)
    if tokenizer == "words":
        return len(tinyworld.vocabulary())
    if _holds_tokens(name):
        return read_manifest(Path(name) / "train" / MANIFEST)["tokenizer"]["n_vocab"]
    return {"gpt2": 50_257, "bytes": 257}.get(tokenizer) or int(tokenizer.removeprefix("bpe-"))


def _check_names(name: str, tokenizer: str | None) -> tuple[list[str], str]:
    """The corpora that `name` joins, and the tokenizer's name or their usual one."""
    parts = name.split("+")
    for part in parts:
        if part not in NAMES and not Path(part).exists():
            raise ValueError(f"no corpus {part!r}: give {', '.join(NAMES)}, or the path of an existing file or folder")
    if "tinyworld" in parts:
        if name != "tinyworld" or tokenizer not in (None, "words"):
            raise ValueError("tinyworld stands alone, and its tokens are words")
        return parts, "words"
    tokenizer = tokenizer or ("gpt2" if all(part in _HUB for part in parts) else "bpe-4096")
    if not (tokenizer in ("gpt2", "bytes") or (tokenizer.startswith("bpe-") and tokenizer[4:].isdigit())):
        raise ValueError(f'a tokenizer is "gpt2", "bytes" or "bpe-N", such as bpe-4096; got {tokenizer!r}')
    return parts, tokenizer


def _holds_tokens(name: str) -> bool:
    return all((Path(name) / split / MANIFEST).is_file() for split in _SPLITS)


def _tinyworld(n_tokens: int, context: int) -> PreparedCorpus:
    world = tinyworld.generate(n_tokens, context=context)
    training, validation = world.part("train"), world.part("validation")
    tokenizer = tokens.WordEncoding([word.replace("\n", "\\n") for word in world.vocabulary], end_of_text="<end>")
    return PreparedCorpus(training.corpus(), validation.corpus(), tokenizer, validation)


def _cache_folder(parts: list[str], tokenizer: str, characters: int, cache: str | Path | None) -> Path:
    root = Path(cache or os.environ.get("CRATELAB_CACHE") or Path.home() / ".cache" / "cratelab")
    names = []
    for part in parts:
        if part in _PYTHON:
            names.append(f"{part}-{platform.python_version()}")
        elif part in _HUB:
            names.append(part)
        else:
            path = Path(part).resolve()
            names.append(f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}")
    return root / f"{'+'.join(names)}-{tokenizer}-{characters}"


def _tokenizer(name: str, parts: list[str], characters: int, folder: Path) -> tokens.Tokenizer:
    file = folder / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    with require("filelock").FileLock(folder / "lock"):  # of several processes one makes it, the others load it
        if not file.is_file():
            if name.startswith("bpe-"):
                sample = _first(_documents(parts, "train"), min(characters, 50_000_000))  # plenty for its merges
                encoding = tokens.train_bpe(sample, int(name.removeprefix("bpe-")))
            else:
                encoding = tokens.gpt2() if name == "gpt2" else tokens.byte_encoding()
            tokens.save(encoding, file)
    return tokens.load(file)


def _documents(parts: list[str], split: str) -> Iterator[Document]:
    return chain.from_iterable(map(lambda part: _part(part, split), parts))


def _part(part: str, split: str) -> Iterator[Document]:
    if part in _PYTHON:
        return select(_PYTHON[part](), split)
    if part in _HUB:
        return iter(_HUB[part](split))
    if Path(part).is_dir():
        with suppress(FileNotFoundError):  # no file bears the split's name
            return iter(LocalDocuments(part, split))
    return select(LocalDocuments(part), split)


def _first(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document.text)
        yield document
