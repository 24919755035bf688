"""Concepts that people have names for, marked at every token of a corpus: TinyWorld's own, and those of real text.

Those of real text are read off the text by fixed rules: spelling (capitals, digits, endings), place (in quotes, in
brackets, in an indented line), and the frequent tokens themselves, as they are and as the token before.
"""

import keyword
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cratelab.corpora.tinyworld import World
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.excerpts import Excerpts
from cratelab.reading import NO_TOKEN, check_size, token_text, tokens_to_read

ONE_WORD = "the word is ", "the token is '", 'the token is "'


@dataclass
class Concepts:
    """Named properties of the tokens of a corpus.

    Attributes:
        names: c of them, readable: "the token before is 'the'".
        truth: (n, c) bool, for every token of the corpus.
    """

    names: list[str]
    truth: Tensor

    @property
    def is_word(self) -> Tensor:
        """(c,) bool, whether a concept is "the word is …" or "the token is …", one of the vocabulary; else grammar."""
        return torch.tensor([name.startswith(ONE_WORD) for name in self.names], dtype=torch.bool)

    def only(self, which: Tensor) -> "Concepts":
        """Some of them, by a mask (c,) or by indices."""
        indices = torch.arange(len(self.names))[which]
        return Concepts([self.names[index] for index in indices], self.truth[:, indices])

    def of(self, excerpts: Excerpts) -> Tensor:
        """(…, w, c) truth in excerpts (…, w) of that corpus; false where there is no text."""
        return self.truth[self.places(excerpts)] & (excerpts.tokens != NO_TOKEN)[..., None]

    def places(self, excerpts: Excerpts) -> Tensor:
        """(…, w) rows of `truth` for the tokens of excerpts; any row where there is no text.

        Raises:
            ValueError: the excerpts reach past the text that the concepts are of.
        """
        places = excerpts.starts[..., None] + torch.arange(excerpts.tokens.shape[-1])
        if ((places >= len(self.truth)) & (excerpts.tokens != NO_TOKEN)).any():
            raise ValueError(f"the concepts are of {len(self.truth)} tokens, and the excerpts are from beyond them")
        return places.clamp(0, len(self.truth) - 1)


def tinyworld_concepts(world: World) -> Concepts:
    """TinyWorld's concepts, and each word as one: "the word is 'bank'"."""
    words = torch.from_numpy(world.tokens.astype(np.int64))[:, None] == torch.arange(len(world.vocabulary))
    names = [*world.concept_names, *(f"the word is {word!r}" for word in world.vocabulary)]
    return Concepts(names, torch.cat([torch.from_numpy(world.concepts), words], 1))


def uses_within_domains(world: World) -> Concepts:
    """Two uses of one kind of word in one domain: "sense:specimen in biology/subject", and the same "/no subject".

    Neither the word nor the domain tells which, only the words before it in its sentence: "the bat needs …", "we
    observed the bat …". Senses are another matter: the domain decides all those that can be known when they are read.
    """
    concept = dict(zip(world.concept_names, world.concepts.T, strict=True))
    names, columns = [], []
    for kind in (name for name in concept if name.startswith("kind:")):
        for domain in (name for name in concept if name.startswith("domain:")):
            here = concept[kind] & concept[domain]
            name = f"sense:{kind.removeprefix('kind:')} in {domain.removeprefix('domain:')}"
            names += [f"{name}/subject", f"{name}/no subject"]
            columns += [here & concept["role:subject"], here & ~concept["role:subject"]]
    return Concepts(names, torch.from_numpy(np.stack(columns, 1)))


def text_concepts(corpus: TokenizedCorpus, tokenizer: Tokenizer, n_frequent: int = 100) -> Concepts:
    """Concepts of real text, by rule.

    Args:
        corpus: the text, in memory as a whole: a few hundred thousand tokens.
        tokenizer: what it was made with.
        n_frequent: as many of the most frequent tokens are concepts, and as many tokens before.

    Raises:
        ValueError: the corpus holds no token, or one that the tokenizer lacks; or `n_frequent` is negative.
    """
    if n_frequent < 0:
        raise ValueError(f"n_frequent must be at least 0; got {n_frequent}")
    tokens_to_read(corpus, None)
    stream = corpus[:].astype(np.int64)
    counts = np.bincount(stream, minlength=corpus.n_vocab)
    spelled = [token_text(tokenizer, token) if count else "" for token, count in enumerate(counts)]
    names = [f"the token {rule}" for rule in SPELLING]
    by_token = np.array([[bool(test(text)) for test in SPELLING.values()] for text in spelled])
    columns = [by_token[stream]]
    place = np.zeros((len(stream), len(PLACES)), bool)
    for index in range(corpus.n_documents):
        start, stop = corpus.document_span(index)
        place[start:stop] = _places([spelled[token] for token in stream[start:stop]])
    names += [f"the token is {where}" for where in PLACES]
    columns.append(place)
    first = np.zeros(len(stream), bool)
    first[[corpus.document_span(index)[0] for index in range(corpus.n_documents)]] = True
    before = np.where(first, -1, np.roll(stream, 1))
    frequent = counts.argsort(kind="stable")[::-1][:n_frequent]
    names += [f"the token is {spelled[token]!r}" for token in frequent]
    names += [f"the token before is {spelled[token]!r}" for token in frequent]
    columns += [stream[:, None] == frequent, before[:, None] == frequent]
    return Concepts(names, torch.from_numpy(np.concatenate(columns, 1)))


def _word(text: str) -> str:
    return text.strip()


SPELLING: dict[str, Callable[[str], object]] = {
    "begins a word": lambda text: re.match(r"\s\w", text),
    "goes on with a word": lambda text: re.match(r"[a-z]", text),
    "begins with a capital": lambda text: _word(text)[:1].isupper(),
    "is all capitals": lambda text: len(_word(text)) > 1 and _word(text).isupper(),
    "holds a digit": lambda text: re.search(r"\d", text),
    "is one letter": lambda text: len(_word(text)) == 1 and _word(text).isalpha(),
    "is punctuation": lambda text: re.fullmatch(r"\s*[^\w\s]+\s*", text),
    "ends a sentence": lambda text: _word(text) in (".", "?", "!"),
    "is a comma": lambda text: _word(text) == ",",
    "holds an underscore": lambda text: "_" in text,
    "opens a bracket": lambda text: re.search(r"[(\[{]", text),
    "closes a bracket": lambda text: re.search(r"[)\]}]", text),
    "holds a quotation mark or backtick": lambda text: re.search(r"[\"'`]", text),
    "is an operator": lambda text: re.fullmatch(r"\s*[-+*/=<>%&|^~]+\s*", text),
    "is a line break": lambda text: "\n" in text,
    "is only space": lambda text: text != "" and text.isspace(),
    "is two spaces or more": lambda text: re.fullmatch(r" {2,}", text),
    "ends in -ing": lambda text: re.search(r"[a-z]ing$", text),
    "ends in -ed": lambda text: re.search(r"[a-z]ed$", text),
    "ends in -ly": lambda text: re.search(r"[a-z]ly$", text),
    "ends in -s": lambda text: re.search(r"[a-z]s$", text),
    "ends in -tion or -ment": lambda text: re.search(r"(tion|ment)$", text),
    "is an article": lambda text: _word(text).lower() in ("a", "an", "the"),
    "is a pronoun": lambda text: _word(text).lower() in ("i", "you", "he", "she", "it", "we", "they", "this", "that"),
    "is a preposition": lambda text: _word(text).lower() in ("of", "in", "to", "for", "with", "on", "at", "by", "from"),
    "is a form of be": lambda text: _word(text).lower() in ("be", "is", "are", "was", "were", "been", "being"),
    "is a modal verb": lambda text: _word(text).lower() in ("can", "will", "may", "must", "should", "would", "could"),
    "is a Python keyword": lambda text: keyword.iskeyword(_word(text)),
}

PLACES = (  # in the order of the columns that are marked: 0 to 5 by `_scan`, the others one by one in `_places`
    "in double quotes",
    "in single quotes or backticks",
    "in brackets",
    "in an indented line",
    "in a line of code after >>>",
    "in a comment after #",
    "the first of its line",
    "part of a web address",
    "in a line that begins with a colon",
    "among the first ten of the document",
)


def _places(pieces: list[str]) -> np.ndarray:
    """(n, places) for the tokens of one document; each is judged at its first character that is no space.

    Columns are numbered as in `PLACES`. A web address and a line with a colon are found in the characters, as what
    `_scan` finds is; the first of a line and of the document are places of tokens, so marked when there are tokens.
    """
    text = "".join(pieces)
    flags = np.zeros((len(text) + 1, len(PLACES)), bool)
    flags[: len(text), :6] = np.array(list(_scan(text)), bool).reshape(-1, 6)
    for found in re.finditer(r"(https?://|www\.)\S+", text):
        flags[found.start() : found.end(), 7] = True
    for found in re.finditer(r"^[ \t]*:.*$", text, re.MULTILINE):
        flags[found.start() : found.end(), 8] = True
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    lead = np.array([len(piece) - len(piece.lstrip(" ")) if piece.strip() else 0 for piece in pieces], np.int64)
    starts = np.cumsum(lengths) - lengths
    found = flags[starts + lead]
    line_starts = {0} | {match.end() for match in re.finditer(r"\n[ \t]*", text)}
    found[:, 6] = [int(start) + int(blank) in line_starts for start, blank in zip(starts, lead, strict=True)]
    found[:10, 9] = True
    return found


def _scan(text: str) -> Iterator[tuple[bool, ...]]:
    """For each character: in double quotes, in other quotes, in brackets, indented, code, comment.

    Quotes end with their line at the latest, brackets with an empty one.
    """
    double = single = code = comment = indented = False
    depth = 0
    for i, character in enumerate(text):
        if i == 0 or text[i - 1] == "\n":
            double = single = comment = False
            indented = character in " \t"
            code = text.startswith((">>>", "..."), i + len(text[i : i + 40]) - len(text[i : i + 40].lstrip(" ")))
            depth = 0 if character == "\n" else depth
        closing = character in ")]}"
        depth = max(0, depth - closing)
        if character == "#" and not (double or single):
            comment = True
        was_double, was_single = double, single
        if character == '"' and not single:
            double = not double
        if character == "`" or (character == "'" and (single or i == 0 or not text[i - 1].isalnum())):
            single = not single
        yield double and was_double, single and was_single, depth > 0, indented, code, comment and character != "\n"
        depth += character in "([{"


def concept_tokens(concepts: Concepts, corpus: TokenizedCorpus, which: Tensor, v: int) -> Tensor:
    """The tokens that have a concept more often than not in a corpus, (m, v) bool for the concepts `which` (m,).

    Concepts of context, such as "inside a quotation", may have none.

    Raises:
        ValueError: the corpus has more than v tokens.
    """
    check_size(corpus, v)
    stream = torch.from_numpy(corpus[:].astype(np.int64))
    truth = concepts.truth.cpu()[:, which.cpu()].float()
    counts = torch.zeros(v, len(which), device="cpu").index_add_(0, stream, truth)
    return counts.mT > stream.bincount(minlength=v) / 2
