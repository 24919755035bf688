import email
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cratelab.corpora import pydocs, tokens
from cratelab.corpora.documents import Document

pytest.importorskip("tiktoken", reason="the extra `corpora` is not installed")
pytest.importorskip("tokenizers", reason="the extra `corpora` is not installed")

DATA = Path(os.environ.get("CRATELAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXTS = [
    "The cat sat.\n\n  It's 1999 – naïve!",
    "",
    " ",
    "\ud800x",
    "<|endoftext|>",
    "日本語 🙂\u200d\u0301",
    "\0\r\n\t",
]


@pytest.fixture(scope="module")
def corpus():
    return list(pydocs.standard_library(Path(email.__file__).parent))


@pytest.fixture(scope="module")
def library(corpus):
    return tokens.train_library_bpe((document.text for document in corpus), 1000)


@pytest.fixture(scope="module")
def bpe(library):
    return tokens.from_library(library, "bpe-1000")


def test_ids_are_those_of_the_library_on_any_text(library, bpe, corpus):
    generator = random.Random(0)
    kinds = [
        lambda: chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)])),
        lambda: generator.choice(" \n\t\u00a0\u3000'sdtre10aA"),
        lambda: generator.choice(corpus).text[generator.randrange(500) :][: generator.randrange(30)],
    ]
    for _ in range(1000):
        text = "".join(generator.choice(kinds)() for _ in range(generator.randrange(1, 50)))
        assert bpe.encode_ordinary(text) == library.encode(text).ids
        assert bpe.decode(bpe.encode_ordinary(text)) == text


@given(st.text())
def test_ids_are_those_of_the_library_on_what_hypothesis_finds(text):
    library, bpe = _pair()
    assert bpe.encode_ordinary(text) == library.encode(text, add_special_tokens=False).ids


def test_every_character_is_split_off_as_by_the_library(library, bpe):
    """Both know Unicode by tables of their own; a newer table in one would part the two."""
    for first in range(0x20, 0x30000, 0x100):
        line = "".join(f"a{c}1 {c}! {c}{c}" for c in map(chr, range(first, first + 0x100)) if not c.isspace())
        line = line.encode("utf8", "ignore").decode()
        assert bpe.encode_ordinary(line) == library.encode(line).ids


def _pair(made=[]):  # noqa: B006  hypothesis takes no fixtures of its own
    if not made:
        library = tokens.train_library_bpe(["abab aab 'll 12 ünï – " * 3, "aaa aaaa aaaaa bb bbb " * 5], 275)
        made += [library, tokens.from_library(library, "small")]
    return made


def test_merges_are_those_of_the_library(library, bpe):
    """Each token, cut by the merges before it alone, falls into the pair that the library merged."""
    model = json.loads(library.to_str())["model"]
    ranks = bpe._mergeable_ranks

    def parts(token: bytes, below: int) -> list[bytes]:
        pieces = [token[i : i + 1] for i in range(len(token))]
        while True:
            pairs = [ranks.get(a + b, below) for a, b in itertools.pairwise(pieces)]
            if not pairs or min(pairs) == below:
                return pieces
            i = pairs.index(min(pairs))
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]

    assert len(model["merges"]) == 1000 - 257
    for rank, pair in enumerate(model["merges"], 256):
        ids = [model["vocab"][token] for token in pair]
        token = bpe.decode_single_token_bytes(rank)
        assert parts(token, rank) == [bpe.decode_single_token_bytes(i) for i in ids]


def test_a_trained_vocabulary_is_gpt2s_form_and_the_same_each_time(bpe, corpus):
    assert bpe.n_vocab == 1000 and bpe.eot_token == 999
    assert [bpe.decode_single_token_bytes(i) for i in (0, 93, 94, 187, 188, 220, 255)] == [
        *(b"!", b"~", "¡".encode("latin-1"), b"\xff", b"\0", b" ", b"\xad")
    ]
    assert tokens.fingerprint(tokens.train_bpe(corpus, 1000)) == tokens.fingerprint(bpe)
    text = "".join(document.text for document in corpus)
    assert len(bpe.encode_ordinary(text)) < 0.4 * len(text)


@pytest.mark.skipif(not (DATA / "gpt2_bpe").is_dir(), reason="no shared data here; CRATELAB_DATA names another place")
def test_gpt2_is_gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    gpt2 = tokens.gpt2()
    assert gpt2.encode_ordinary("Hello, world") == [15496, 11, 995] and gpt2.n_vocab == 50257 == gpt2.eot_token + 1
    from tokenizers import Tokenizer, models, pre_tokenizers

    files = (str(DATA / "gpt2_bpe" / name) for name in ("encoder.json", "vocab.bpe"))
    library = Tokenizer(models.BPE.from_file(*files))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokens.fingerprint(tokens.from_library(library, "same")) == tokens.fingerprint(gpt2)


def test_gpt2_offline_says_what_to_do(monkeypatch, tmp_path):
    import requests
    import tiktoken

    def offline(*_):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(ConnectionError, match=r"no route.*TIKTOKEN_CACHE_DIR.*train_bpe"):
        tokens.gpt2()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_trivial_tokenizer(text):
    encoding = tokens.byte_encoding()
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    expected = list(text.encode("utf8", "surrogatepass")) if "\ud800" not in text else list("\ufffdx".encode())
    assert encoding.encode_ordinary(text) == expected
    assert encoding.encode_ordinary(text * 300) == expected * 300


def test_words_are_their_places_in_the_vocabulary():
    words = tokens.WordEncoding(["bank", ".", "the"])
    assert words.encode_ordinary("the bank\n.") == [2, 0, 1] and words.decode([2, 0, 1]) == "the bank ."
    assert words.n_vocab == 4 and words.eot_token == 3 and words.vocabulary[3] == tokens.END_OF_TEXT
    ended = tokens.WordEncoding(["<end>", "a"], end_of_text="<end>")
    assert ended.n_vocab == 2 and ended.eot_token == 0
    with pytest.raises(ValueError, match=r"2 words are not among the 4 .*'bark', 'bat'"):
        words.encode_ordinary("bat the bark bark")
    for wrong in (["a", "a"], ["a b"], [""]):
        with pytest.raises(ValueError, match="words must differ"):
            tokens.WordEncoding(wrong)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_what_encode_ordinary_gives(bpe, text):
    for tokenizer in bpe, tokens.byte_encoding():
        ids = tokens.encode(tokenizer, text)
        assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode_ordinary(text)
    assert tokens.encode(tokens.WordEncoding(["a", "b"]), "b a").tolist() == [1, 0]


def test_a_saved_tokenizer_is_the_same_again(bpe, tmp_path):
    for tokenizer in bpe, tokens.byte_encoding(), tokens.WordEncoding(["ü", "."], end_of_text="."):
        tokens.save(tokenizer, tmp_path / "tokenizer.json")
        loaded = tokens.load(tmp_path / "tokenizer.json")
        assert [loaded.name, loaded.n_vocab, loaded.eot_token] == [
            *(tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token)
        ]
        assert tokens.fingerprint(loaded) == tokens.fingerprint(tokenizer)
        assert loaded.encode_ordinary("ü .") == tokenizer.encode_ordinary("ü .")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprints_tell_tokenizers_apart_and_ignore_names(bpe):
    import tiktoken

    parts = dict(pat_str=bpe._pat_str, mergeable_ranks=bpe._mergeable_ranks, special_tokens=bpe._special_tokens)
    renamed = tiktoken.Encoding("other", **parts)
    repatterned = tiktoken.Encoding("other", **parts | {"pat_str": r"\S+|\s+"})
    others = [repatterned, tokens.byte_encoding(), tokens.WordEncoding(["a"]), tokens.WordEncoding(["b"])]
    assert tokens.fingerprint(renamed) == tokens.fingerprint(bpe)
    assert len({tokens.fingerprint(tokenizer) for tokenizer in [bpe, *others]}) == 5
    with pytest.raises(ValueError, match="only special one"):
        tokens.fingerprint(tiktoken.Encoding("other", **parts | {"special_tokens": {"<end>": 999}}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "pickle"}', '{"kind": "words", "tokens": ["a", "a"]}'])
def test_a_file_that_holds_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t.json holds no tokenizer"):
        tokens.load(tmp_path / "t.json")
    facts = {"kind": "bytes", "name": "x", "pattern": ".", "end_of_text": tokens.END_OF_TEXT, "tokens": ["YQ=="]}
    (tmp_path / "t.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"every single byte"):
        tokens.load(tmp_path / "t.json")


def test_too_little_text_and_tokenizers_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"gives only 259 tokens that occur twice, not 300"):
        tokens.train_bpe([Document("aba aba")], 300)
    with pytest.raises(ValueError, match="got 256"):
        tokens.train_bpe([Document("aba aba")], 256)
    from tokenizers import Tokenizer, models

    for merges in [], [("a", "b"), ("b", "a")], [("b", "a")]:
        alphabet = sorted(json.loads(_pair()[0].to_str())["model"]["vocab"], key=_pair()[0].token_to_id)[:256]
        vocabulary = {token: i for i, token in enumerate([*alphabet, "ba", "ab"])}
        with pytest.raises(ValueError, match="256 bytes, then one for each merge"):
            tokens.from_library(Tokenizer(models.BPE(vocabulary, merges)), "x")


def test_training_survives_text_that_is_no_unicode():
    assert tokens.train_bpe([Document("aba aba \ud800")], 258).n_vocab == 258
