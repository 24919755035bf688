import numpy as np
import pytest
import torch

from cratelab.corpora import tinyworld
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import byte_encoding
from cratelab.interpret.concepts import Concepts, text_concepts, tinyworld_concepts, uses_within_domains
from cratelab.interpret.excerpts import Excerpts
from cratelab.reading import NO_TOKEN

TEXT = """The two banks merged; see https://example.org/a_b (or [2]).
    >>> print("a word", 'b')  # a note
:param int n3: it is NOT running quickly
"""


@pytest.fixture(scope="module")
def marked():
    encoding = byte_encoding()
    pieces = [encoding.encode_ordinary(text) for text in (TEXT, "second text")]
    tokens = np.concatenate([np.array([*piece, encoding.eot_token]) for piece in pieces])
    document = np.repeat([0, 1], [len(pieces[0]) + 1, len(pieces[1]) + 1])
    corpus = TokenizedCorpus.from_arrays(tokens, document, ["a", "a"], encoding.n_vocab)
    return text_concepts(corpus, encoding, n_frequent=5)


def where(marked: Concepts, name: str) -> str:
    """The characters of the first text at which a concept is true."""
    truth = marked.truth[: len(TEXT), marked.names.index(name)]
    return "".join(character for character, true in zip(TEXT, truth.tolist(), strict=True) if true)


@pytest.mark.parametrize(
    ("name", "characters"),
    [
        ("the token is in double quotes", "a word"),
        ("the token is in single quotes or backticks", "b"),
        ("the token is in brackets", "or [2]\"a word\", 'b'"),
        ("the token is part of a web address", "https://example.org/a_b"),
        ("the token is in a comment after #", "# a note"),
        ("the token is in a line that begins with a colon", ":param int n3: it is NOT running quickly"),
        ("the token is the first of its line", "T>:"),
        ("the token holds a digit", "23"),
        ("the token ends a sentence", ".."),
        ("the token is a comma", ","),
        ("the token is among the first ten of the document", "The two ba"),
    ],
)
def test_rules_mark_what_they_say(marked, name, characters):
    assert where(marked, name) == characters


def test_code_is_its_whole_line(marked):
    assert where(marked, "the token is in a line of code after >>>").strip() == TEXT.splitlines()[1].strip()
    assert where(marked, "the token is in an indented line").strip() == TEXT.splitlines()[1].strip()


def test_the_token_before_stops_at_the_document(marked):
    frequent = [name for name in marked.names if name.startswith("the token before is ")]
    assert len(frequent) == 5
    for name in frequent:
        here = marked.truth[:, marked.names.index(name.replace(" before", ""))]
        after = marked.truth[:, marked.names.index(name)]
        expected = torch.cat([torch.tensor([False]), here[:-1]])
        expected[len(TEXT) + 1] = False
        assert after.equal(expected)


def test_spelling_of_words():
    from cratelab.interpret.concepts import SPELLING

    def said(text):
        return {name for name, test in SPELLING.items() if test(text)}

    assert {"begins a word", "ends in -ly"} <= said(" quickly") and "begins with a capital" not in said(" quickly")
    assert {"is all capitals", "begins with a capital"} <= said(" NOT")
    assert {"is an article", "begins a word"} <= said(" The") and "is a form of be" in said(" was")
    assert {"is a Python keyword", "goes on with a word"} <= said("lambda")
    assert {"is only space", "is two spaces or more"} <= said("    ") and said("") == set()
    assert {"is a line break", "is only space"} <= said("\n")


def test_tinyworlds_concepts_and_words_are_looked_up_by_place():
    world = tinyworld.generate(3000, context=128)
    marked = tinyworld_concepts(world)
    assert marked.truth.shape == (3000, len(world.concept_names) + len(world.vocabulary))
    starts = torch.tensor([[[100, 2990, -1]]])
    tokens = torch.from_numpy(world.tokens.astype(np.int32))[(starts[..., None] + torch.arange(16)).clamp(0, 2999)]
    tokens[0, 0, 1, 10:] = NO_TOKEN
    tokens[0, 0, 2] = NO_TOKEN
    found = marked.of(Excerpts(tokens, torch.zeros(tokens.shape), starts, torch.zeros_like(starts)))
    assert found[0, 0, 0].equal(marked.truth[100:116]) and not found[0, 0, 2].any() and not found[0, 0, 1, 10:].any()
    word = marked.names.index(f"the word is {world.vocabulary[world.tokens[100]]!r}")
    assert bool(found[0, 0, 0, 0, word])


def tiny(tokens, n_vocab=300):
    tokens = np.array(tokens, np.int64)
    return TokenizedCorpus.from_arrays(tokens, np.zeros_like(tokens), ["a"] * bool(len(tokens)), n_vocab)


def test_one_token_has_concepts():
    found = text_concepts(tiny([65]), byte_encoding(), n_frequent=3)
    assert found.truth.shape == (1, len(found.names)) and found.truth[0, found.names.index("the token is 'A'")]


@pytest.mark.parametrize(
    ("corpus", "n_frequent", "message"),
    [
        (tiny([65, 299]), 5, "there is no token 299 in the tokenizer bytes"),
        (tiny([]), 5, "no token"),
        (tiny([65]), -1, "n_frequent must be at least 0"),
    ],
)
def test_what_has_no_concepts_is_named(corpus, n_frequent, message):
    with pytest.raises(ValueError, match=message):
        text_concepts(corpus, byte_encoding(), n_frequent)


def test_concepts_of_another_text_are_refused(marked):
    beyond = torch.full((1, 1, 1), len(marked.truth) - 2)
    excerpts = Excerpts(torch.zeros(1, 1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 1, 4), beyond, beyond * 0)
    with pytest.raises(ValueError, match=f"are of {len(marked.truth)} tokens, and the excerpts are from beyond"):
        marked.of(excerpts)
    assert marked.of(excerpts.without(torch.tensor([False, False, True, True]))).shape == (
        1,
        1,
        1,
        4,
        len(marked.names),
    )


def test_words_are_told_from_grammar_and_concepts_chosen(marked):
    words = [name for name, is_word in zip(marked.names, marked.is_word.tolist(), strict=True) if is_word]
    assert len(words) == 5 and all(name[:14] in ("the token is '", 'the token is "') for name in words)
    chosen = marked.only(marked.is_word)
    assert chosen.names == words and chosen.is_word.all() and chosen.truth.shape == (len(marked.truth), 5)
    again = marked.only(torch.tensor([marked.names.index(words[2])]))
    assert (again.truth == chosen.truth[:, 2:3]).all()
    world = tinyworld.generate(500)
    named = tinyworld_concepts(world)
    assert int(named.is_word.sum()) == len(world.vocabulary)


def test_uses_of_one_kind_of_word_are_those_of_the_sentences():
    world = tinyworld.generate(30_000, context=128)
    uses = uses_within_domains(world)
    subject, other = (uses.names.index(f"sense:specimen in biology/{use}") for use in ("subject", "no subject"))
    assert not uses.truth[:, [subject, other]].all(1).any()
    seen = {}
    for column in subject, other:
        for place in uses.truth[:, column].nonzero()[:, 0].tolist():
            assert world.domain[world.document[place]] == "biology"
            seen.setdefault(" ".join(world.vocabulary[t] for t in world.tokens[place - 3 : place]), set()).add(column)
    assert seen["we followed the"] == {other} and all(
        uses == {subject} for before, uses in seen.items() if before.endswith(". the")
    )
