"""Corpora by name, ready for training: tokenised once, kept in a cache, split into training and validation.

| name | what | tokens |
|---|---|---|
| `tinyworld` | generated, labelled, with known entropy | words |
| `pydocs` | documentation of Python's standard library | BPE of 4,096 |
| `packages` | documentation and comments of installed scientific packages | BPE of 4,096 |
| `wikitext`, `tinystories`, `pile` | from the Hugging Face hub | GPT-2's |
| a file or folder | JSON lines, Parquet or text, as `cratelab.corpora.files` reads them | BPE of 4,096 |
| a folder of tokens | `train` and `validation` as an earlier call left them in its cache | its own |

Several of text are joined by `+`: `pydocs+packages`, `pydocs+./essays`. A name of the table is always that corpus
(`./pile` is a folder of that name), `~` is the home folder, and what exists as a path is never taken apart: where a `+`
could also belong to a path, the longest path that exists is meant.

**Splits.** Of a folder in which files or folders are named for a split (`cratelab.corpora.files.split_named_by`), these
are it, and likewise of several files or folders that are joined: what is named for validation or test is never trained
on. Without such names, and for validation where only training and test have theirs, the hash of each text decides
(`cratelab.corpora.documents.split_of`); a corpus so small that none is left to validate on gives the text of the lowest
hash. A text that is held out anywhere is left out of training everywhere, except for the test split of a data set on
the hub, which is not read; blank documents are left out altogether.

**Cache.** Tokens lie in a folder whose name ends in a hash of all that makes them: the content of local files (if they
are above 1 GiB, their sizes and times), versions and sources of Python or of the packages, tokenizer, size and edition
of this module. What has changed is made anew, and old folders may be removed. What a data set of the hub holds today is
not asked: remove its folder to read it again.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cratelab.corpora import sources, tinyworld, tokenizers
from cratelab.corpora.documents import FRACTIONS
from cratelab.corpora.sources import CorpusText, first_characters, identity
from cratelab.corpora.token_store import FORMAT, MANIFEST, TokenizedCorpus, read_manifest
from cratelab.corpora.token_writer import tokenize
from cratelab.storage import digest_of, locked, read_json, write_json

_HUB, _PYTHON = sources.HUB, sources.PYTHON
_SPLITS = "train", "validation"
NAMES = "tinyworld", *_PYTHON, *_HUB

# To be raised when the same files would give other documents than before.
_EDITION = 2


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
    tokenizer: tokenizers.Tokenizer
    world: tinyworld.World | None = None

    @property
    def floor(self) -> float | None:
        """Nats a token that no model can go below on the validation text, where it is known."""
        return self.world and self.world.entropy_rate


def prepare(
    name: str | Path,
    tokenizer: str | Path | None = None,
    characters: int = 200_000_000,
    context: int = 512,
    cache: str | Path | None = None,
) -> PreparedCorpus:
    """A corpus by its name, from the cache where it has been made before.

    Args:
        name: see the table above.
        tokenizer: "words" (TinyWorld's), "bytes", "gpt2", or "bpe-N": a byte-level BPE of N tokens trained on the
            training text; or a .json file that `cratelab.corpora.tokenizers.save` wrote, such as a run's. The table's
            unless given.
        characters: of training text, at most; validation takes at most a twentieth, but one document. TinyWorld's size
            is two million tokens at most.
        context: longest document of TinyWorld, so that a model's window can hold it.
        cache: folder for the tokens; the environment's `CRATELAB_CACHE`, or ~/.cache/cratelab, unless given. Of several
            processes that need the same tokens one makes them, and the others wait.

    Raises:
        ValueError: there is no corpus or tokenizer of that name, `characters` or `context` is not at least 1, or there
            is too little text to train and to validate on.
        FileNotFoundError: a path holds no text, or none to train on.
        ConnectionError: a corpus of the hub is not on this machine, and the hub cannot be reached.
        OSError: the cache cannot be written, or there is no home folder for it.
    """
    if not 1 <= characters < float("inf") or not 1 <= context < float("inf"):
        raise ValueError(f"characters and context must be at least 1, and finite; got {characters} and {context}")
    characters, parts = int(characters), _parts(name)
    given = _load_given(tokenizer)
    if folder := _folder_of_tokens(parts, None if given else tokenizer):
        encoding = given or tokenizers.load(folder / "tokenizer.json")
        return PreparedCorpus(*(TokenizedCorpus.open(folder / split, encoding) for split in _SPLITS), encoding)
    tokenizer = _tokenizer_name(parts, tokenizer, given)
    if "tinyworld" in parts:
        return _tinyworld(min(2_000_000, max(1, characters // 5)), int(context))
    text = CorpusText(parts, characters)
    facts = {
        "edition": _EDITION,
        "format": FORMAT,
        "corpus": [identity(part) for part in parts],
        "splits": text.splits,
        "fractions": list(FRACTIONS),
        "tokenizer": tokenizers.fingerprint(given) if given else tokenizer,
        "characters": characters,
    }
    names = "+".join(part if part in NAMES else Path(part).resolve().name for part in parts)[:40]
    label = re.sub(r"[^\w.-]", "_", tokenizer)[:40]  # a file may say any name
    folder = _cache(cache) / f"{names}-{label}-{characters}-{digest_of(facts)[:16]}"
    encoding = _tokenizer(tokenizer, text, folder, facts, given)
    corpora = []
    for split, documents in zip(_SPLITS, (text.training, text.validation), strict=True):
        if (folder / split / MANIFEST).is_file():
            corpora.append(TokenizedCorpus.open(folder / split, encoding))
            continue
        with tqdm(desc=f"{name}: {split} tokens", unit="token", unit_scale=True, disable=None) as bar:
            done = tokenize(documents(), folder / split, encoding, on_shard=lambda shard: bar.update(shard["n_tokens"]))
            corpora.append(done)
    return PreparedCorpus(*corpora, encoding)


def vocabulary_size(name: str | Path, tokenizer: str | Path | None = None) -> int:
    """How many tokens `prepare(name, tokenizer)` will tell apart; nothing is read.

    Raises:
        ValueError: there is no corpus or tokenizer of that name.
    """
    parts, given = _parts(name), _load_given(tokenizer)
    if folder := _folder_of_tokens(parts, None if given else tokenizer):
        return read_manifest(folder / "train" / MANIFEST)["tokenizer"]["n_vocab"]
    tokenizer = _tokenizer_name(parts, tokenizer, given)
    if "tinyworld" in parts:
        return len(tinyworld.vocabulary())
    if given:
        return given.n_vocab
    return {"gpt2": 50_257, "bytes": 257}.get(tokenizer) or int(tokenizer.removeprefix("bpe-"))


def _parts(name: str | Path) -> list[str]:
    """The corpora that `name` joins: names, and paths that exist."""
    if isinstance(name, Path):
        name = os.path.abspath(os.path.expanduser(name))
    parts, rest = [], name
    while True:
        ends = [i for i in range(len(rest)) if rest[i] == "+"] + [len(rest)]
        part = next((rest[:end] for end in reversed(ends) if _exists(rest[:end])), None)
        if part is None:
            wrong = rest.split("+")[0]
            raise ValueError(
                f"no corpus {wrong!r}{f' in {name!r}' if wrong != name else ''}: give {', '.join(NAMES)}, or the path "
                "of an existing file or folder; several are joined by +"
            )
        parts.append(part if part in NAMES else os.path.expanduser(part))
        if part == rest:
            return parts
        rest = rest[len(part) + 1 :]


def _exists(part: str) -> bool:
    return part in NAMES or (part != "" and os.path.exists(os.path.expanduser(part)))


def _folder_of_tokens(parts: list[str], tokenizer: str | None) -> Path | None:
    """The folder that a corpus is if it holds tokens.

    Raises:
        ValueError: it does, of another tokenizer than the one named.
    """
    folder = Path(parts[0])
    if len(parts) > 1 or parts[0] in NAMES or not any((folder / split / MANIFEST).is_file() for split in _SPLITS):
        return None
    for split in _SPLITS:
        if not (folder / split / MANIFEST).is_file():
            raise ValueError(f"{folder} holds tokens, but {split} is missing or unfinished: copy it again, whole")
        made_with = read_manifest(folder / split / MANIFEST)["tokenizer"]["name"]
        if tokenizer not in (None, made_with):
            raise ValueError(f"{folder} holds tokens of {made_with!r}, not of {tokenizer!r}: leave the tokenizer out")
    return folder


def _load_given(tokenizer: str | Path | None) -> tokenizers.Tokenizer | None:
    """The tokenizer, where a file of one is given."""
    is_file = isinstance(tokenizer, Path) or (tokenizer or "").endswith(".json")
    return tokenizers.load(os.path.expanduser(tokenizer)) if is_file else None


def _tokenizer_name(parts: list[str], tokenizer: str | Path | None, given: tokenizers.Tokenizer | None) -> str:
    """The tokenizer's name, or that of the usual one of these corpora."""
    tokenizer = given.name if given else tokenizer
    if "tinyworld" in parts:
        if len(parts) > 1 or tokenizer not in (None, "words"):
            raise ValueError("tinyworld stands alone, and its tokens are words")
        return "words"
    if given:
        return tokenizer
    tokenizer = tokenizer or ("gpt2" if all(part in _HUB for part in parts) else "bpe-4096")
    if tokenizer not in ("gpt2", "bytes") and not re.fullmatch("bpe-[1-9][0-9]{0,9}", tokenizer):
        raise ValueError(f'a tokenizer is "gpt2", "bytes" or "bpe-N", such as bpe-4096; got {tokenizer!r}')
    if tokenizer.startswith("bpe-") and not 257 <= int(tokenizer[4:]) <= tokenizers.LARGEST_VOCABULARY:
        raise ValueError(f"the N of bpe-N must be 257 to {tokenizers.LARGEST_VOCABULARY:,}; got {tokenizer!r}")
    return tokenizer


def _tinyworld(n_tokens: int, context: int) -> PreparedCorpus:
    world = tinyworld.generate(n_tokens, context=context)
    training, validation = world.part("train"), world.part("validation")
    return PreparedCorpus(training.corpus(), validation.corpus(), tinyworld_encoding(), validation)


def tinyworld_encoding() -> tokenizers.WordEncoding:
    """TinyWorld's words as tokens, with a line break written as backslash and n."""
    return tokenizers.WordEncoding([word.replace("\n", "\\n") for word in tinyworld.vocabulary()], end_of_text="<end>")


def _cache(folder: str | Path | None) -> Path:
    try:
        root = folder or os.environ.get("CRATELAB_CACHE") or Path.home() / ".cache" / "cratelab"
        root = Path(os.path.expanduser(root))
        root.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:  # RuntimeError: there is no home folder
        raise OSError(f"there is no place to keep tokens in: {error}; set CRATELAB_CACHE to a folder") from error
    return root


def _tokenizer(
    name: str, text: CorpusText, folder: Path, facts: dict, given: tokenizers.Tokenizer | None
) -> tokenizers.Tokenizer:
    file, made_of = folder / "tokenizer.json", folder / "made_of.json"
    if not file.is_file():
        with locked(folder / "lock"):  # of several processes one makes it, the others load it
            if not file.is_file():
                if given:
                    encoding = given
                elif name.startswith("bpe-"):
                    sample = first_characters(text.training(), 50_000_000)  # plenty for its merges
                    encoding = tokenizers.train_bpe(sample, int(name.removeprefix("bpe-")))
                else:
                    encoding = tokenizers.gpt2() if name == "gpt2" else tokenizers.byte_encoding()
                write_json(made_of, facts)
                tokenizers.save(encoding, file)
    try:
        if read_json(made_of) != facts:
            raise ValueError(f"{made_of} tells of something else")
        return tokenizers.load(file)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} was not made of this corpus, or is damaged: {error}. Remove it") from error
