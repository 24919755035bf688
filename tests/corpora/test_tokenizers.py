import email
import itertools
import json
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cratelab.corpora import pydocs, tokenizers
from cratelab.corpora.documents import Document
from cratelab.corpora.token_writer import tokenize

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
    return tokenizers.train_library_bpe((document.text for document in corpus), 1000)


@pytest.fixture(scope="module")
def bpe(library):
    return tokenizers.from_library(library, "bpe-1000")


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
        library = tokenizers.train_library_bpe(["abab aab 'll 12 ünï – " * 3, "aaa aaaa aaaaa bb bbb " * 5], 275)
        made += [library, tokenizers.from_library(library, "small")]
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
    assert tokenizers.fingerprint(tokenizers.train_bpe(corpus, 1000)) == tokenizers.fingerprint(bpe)
    text = "".join(document.text for document in corpus)
    assert len(bpe.encode_ordinary(text)) < 0.4 * len(text)


@pytest.mark.skipif(not (DATA / "gpt2_bpe").is_dir(), reason="no shared data here; CRATELAB_DATA names another place")
def test_gpt2_is_gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    gpt2 = tokenizers.gpt2()
    assert gpt2.encode_ordinary("Hello, world") == [15496, 11, 995] and gpt2.n_vocab == 50257 == gpt2.eot_token + 1
    from tokenizers import Tokenizer, models, pre_tokenizers

    files = (str(DATA / "gpt2_bpe" / name) for name in ("encoder.json", "vocab.bpe"))
    library = Tokenizer(models.BPE.from_file(*files))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizers.fingerprint(tokenizers.from_library(library, "same")) == tokenizers.fingerprint(gpt2)


def test_gpt2_offline_says_what_to_do(monkeypatch, tmp_path):
    import requests
    import tiktoken

    def offline(*_):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(ConnectionError, match=r"no route.*TIKTOKEN_CACHE_DIR.*train_bpe"):
        tokenizers.gpt2()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_trivial_tokenizer(text):
    encoding = tokenizers.byte_encoding()
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    expected = list(text.encode("utf8", "surrogatepass")) if "\ud800" not in text else list("\ufffdx".encode())
    assert encoding.encode_ordinary(text) == expected
    assert encoding.encode_ordinary(text * 300) == expected * 300


def test_words_are_their_places_in_the_vocabulary():
    words = tokenizers.WordEncoding(["bank", ".", "the"])
    assert words.encode_ordinary("the bank\n.") == [2, 0, 1] and words.decode([2, 0, 1]) == "the bank ."
    assert words.n_vocab == 4 and words.eot_token == 3 and words.vocabulary[3] == tokenizers.END_OF_TEXT
    ended = tokenizers.WordEncoding(["<end>", "a"], end_of_text="<end>")
    assert ended.n_vocab == 2 and ended.eot_token == 0
    with pytest.raises(ValueError, match=r"2 words are not among the 4 .*'bark', 'bat'"):
        words.encode_ordinary("bat the bark bark")
    for wrong in (["a", "a"], ["a b"], [""]):
        with pytest.raises(ValueError, match="words must differ"):
            tokenizers.WordEncoding(wrong)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_what_encode_ordinary_gives(bpe, text):
    for tokenizer in bpe, tokenizers.byte_encoding():
        ids = tokenizers.encode(tokenizer, text)
        assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode_ordinary(text)
    assert tokenizers.encode(tokenizers.WordEncoding(["a", "b"]), "b a").tolist() == [1, 0]


def test_a_saved_tokenizer_is_the_same_again(bpe, tmp_path):
    for tokenizer in bpe, tokenizers.byte_encoding(), tokenizers.WordEncoding(["ü", "."], end_of_text="."):
        tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
        loaded = tokenizers.load(tmp_path / "tokenizer.json")
        assert [loaded.name, loaded.n_vocab, loaded.eot_token] == [
            *(tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token)
        ]
        assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(tokenizer)
        assert loaded.encode_ordinary("ü .") == tokenizer.encode_ordinary("ü .")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprints_tell_tokenizers_apart_and_ignore_names(bpe):
    import tiktoken

    parts = dict(pat_str=bpe._pat_str, mergeable_ranks=bpe._mergeable_ranks, special_tokens=bpe._special_tokens)
    renamed = tiktoken.Encoding("other", **parts)
    repatterned = tiktoken.Encoding("other", **parts | {"pat_str": r"\S+|\s+"})
    others = [repatterned, tokenizers.byte_encoding(), tokenizers.WordEncoding(["a"]), tokenizers.WordEncoding(["b"])]
    assert tokenizers.fingerprint(renamed) == tokenizers.fingerprint(bpe)
    assert len({tokenizers.fingerprint(tokenizer) for tokenizer in [bpe, *others]}) == 5
    with pytest.raises(ValueError, match="only special one"):
        tokenizers.fingerprint(tiktoken.Encoding("other", **parts | {"special_tokens": {"<end>": 999}}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "pickle"}', '{"kind": "words", "tokens": ["a", "a"]}'])
def test_a_file_that_holds_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t.json holds no tokenizer"):
        tokenizers.load(tmp_path / "t.json")
    facts = {"kind": "bytes", "name": "x", "pattern": ".", "end_of_text": tokenizers.END_OF_TEXT, "tokens": ["YQ=="]}
    (tmp_path / "t.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"every single byte"):
        tokenizers.load(tmp_path / "t.json")


def test_too_little_text_and_tokenizers_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"gives only 259 tokens that occur twice, not 300"):
        tokenizers.train_bpe([Document("aba aba")], 300)
    with pytest.raises(ValueError, match="got 256"):
        tokenizers.train_bpe([Document("aba aba")], 256)
    from tokenizers import Tokenizer, models

    for merges in [], [("a", "b"), ("b", "a")], [("b", "a")]:
        alphabet = sorted(json.loads(_pair()[0].to_str())["model"]["vocab"], key=_pair()[0].token_to_id)[:256]
        vocabulary = {token: i for i, token in enumerate([*alphabet, "ba", "ab"])}
        with pytest.raises(ValueError, match="256 bytes, then one for each merge"):
            tokenizers.from_library(Tokenizer(models.BPE(vocabulary, merges)), "x")


def test_training_survives_text_that_is_no_unicode():
    assert tokenizers.train_bpe([Document("aba aba \ud800")], 258).n_vocab == 258


def pieces_of(text: str, longest: int, monkeypatch) -> list[str]:
    monkeypatch.setattr(tokenizers, "LONGEST_PIECE", longest)
    return list(tokenizers.pieces(text))


@pytest.mark.skipif(not (DATA / "gpt2_bpe").is_dir(), reason="no shared data here; CRATELAB_DATA names another place")
def test_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, corpus):
    """Random text of all kinds of characters, cut often; only where no place to cut was found may tokens differ."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    gpt2, draw, compared = tokenizers.gpt2(), random.Random(0), 0
    alphabets = [
        " \n\t\r\u00a0\u3000\x1c\x85'sdtrelvm10aA,.!_-。、½²٣é\u0301日本🙂",
        " \n,.'aA1é日",
        "ab'l\u0301!  \n\n7",
    ]
    for i in range(4000):
        letters = alphabets[i % 3] if i % 4 else "".join(chr(draw.randrange(32, 0x3000)) for _ in range(20)) + "  ab'"
        text = "".join(draw.choices(letters, k=draw.randrange(1, 60)))
        cut = pieces_of(text, 12, monkeypatch)
        assert "".join(cut) == text and max(map(len, cut)) <= 12
        if all(len(piece) < 12 for piece in cut[:-1]):
            compared += 1
            assert tokenizers.encode(gpt2, text).tolist() == gpt2.encode_ordinary(text)
    assert compared > 1000
    monkeypatch.undo()
    text = "".join(document.text for document in corpus)
    assert len(text) > 50_000 and len(pieces_of(text, 4096, monkeypatch)) < 1.1 * len(text) / 4096
    assert tokenizers.encode(gpt2, text).tolist() == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("run", [" ", "a", "ab1", "\n", "-", "日", "\u0301", "'"])
def test_a_run_without_end_reaches_no_library_whole(bpe, run, monkeypatch):
    text, longest = run * (200_000 // len(run)) + "x", []
    encode = tokenizers._encode_piece

    def encode_piece(tokenizer, piece):
        longest.append(len(piece))
        return encode(tokenizer, piece)

    monkeypatch.setattr(tokenizers, "_encode_piece", encode_piece)
    for tokenizer in bpe, tokenizers.byte_encoding():
        longest.clear()
        assert tokenizer.decode(tokenizers.encode(tokenizer, text).tolist()) == text
        assert max(longest) <= 4096 and len(longest) <= 2 + 2 * len(text) // 4096


def watch_training(monkeypatch, train) -> None:
    """`train(library's tokenizer, texts, trainer)` takes the place of the library's training."""
    library = tokenizers.require("tokenizers")
    real = library.Tokenizer

    class Watched:
        def __init__(self, model):
            self.__dict__["real"] = real(model)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __setattr__(self, name, value):
            setattr(self.real, name, value)

        def train_from_iterator(self, texts, trainer):
            train(self.real, texts, trainer)

    monkeypatch.setattr(library, "Tokenizer", Watched)


def test_training_reads_a_run_without_end_in_pieces(monkeypatch):
    read = []

    def train(tokenizer, texts, trainer):
        read.extend(texts)
        tokenizer.train_from_iterator(read, trainer)

    watch_training(monkeypatch, train)
    text = "The cat sat on the mat. " * 50
    runs = tokenizers.train_library_bpe([text, " " * 100_000 + "a", "b" * 100_000], 270)
    assert max(map(len, read)) <= 4096 and sum(map(len, read)) == 200_001 + len(text)
    assert runs.get_vocab_size() == 270


@contextmanager
def interrupted_after(seconds: float):
    """Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_training_and_tokenising_can_be_interrupted(monkeypatch, tmp_path):
    heard, ended, encoded = Event(), Event(), []

    def train(tokenizer, texts, trainer):
        next(texts)
        heard.wait(60)
        assert not list(texts), "no more is read"
        ended.set()

    watch_training(monkeypatch, train)
    start = time.monotonic()
    with interrupted_after(0.3):
        tokenizers.train_library_bpe(["abc"] * 9, 300)
    assert time.monotonic() - start < 30
    heard.set()
    assert ended.wait(30)

    def encode_piece(tokenizer, piece):
        encoded.append(piece)
        time.sleep(0.01)
        return np.zeros(1, np.uint32)

    monkeypatch.setattr(tokenizers, "_encode_piece", encode_piece)
    with interrupted_after(0.3):
        tokenize([Document("a" * 4096 * 10_000)], tmp_path, tokenizers.byte_encoding())
    n = len(encoded)
    time.sleep(0.05)
    assert n == len(encoded) < 1000, "the thread that encodes has stopped, too"


@pytest.mark.parametrize(
    "pattern", ["", "(", r"(?<=a*)b", "a+", r"\w+", r"\p{Foo}", "(a|b)*\\1", r"\S+|\s+(?!\S)", "[^Ж]", "[^🙂]"]
)
def test_a_pattern_that_a_library_cannot_use_or_that_loses_text_is_refused(tmp_path, pattern):
    tokenizers.save(tokenizers.byte_encoding(), tmp_path / "t.json")
    facts = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(facts | {"pattern": pattern}))
    with pytest.raises(ValueError, match=r"t.json holds no tokenizer"):
        tokenizers.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps(facts | {"pattern": r"\S+|\s+"}))
    assert tokenizers.load(tmp_path / "t.json").encode_ordinary("a b") == [97, 32, 98]


def test_a_document_that_cannot_be_encoded_is_named(tmp_path):
    import tiktoken

    ranks = {bytes([value]): value for value in range(256)}
    panics = tiktoken.Encoding(
        "p", pat_str="b|(?=d)", mergeable_ranks=ranks, special_tokens={tokenizers.END_OF_TEXT: 256}
    )
    documents = [Document("b", {"domain": "d"}), Document("acd", {"domain": "d", "path": "x/y.txt"})]
    with pytest.raises(
        ValueError, match=r"document 1 .*domain 'd', path 'x/y.txt'; it begins 'acd'.* 'p' gave up on 3"
    ):
        tokenize(documents, tmp_path / "panics", panics)
    with pytest.raises(ValueError, match=r"document 0 .*1 words are not among"):
        tokenize(documents, tmp_path / "words", tokenizers.WordEncoding(["a"]))
    wrong = tokenizers.WordEncoding(["b", "acd"])
    wrong.n_vocab = 1
    with pytest.raises(ValueError, match=r"document 1 .*token 1 is not in the vocabulary of 1"):
        tokenize(documents, tmp_path / "wrong", wrong)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_of_a_changed_tokenizer_only_errors_that_name_the_file_come_out(tmp_path, kind):
    file, draw = tmp_path / "t.json", random.Random(kind)
    tokenizers.save(tokenizers.byte_encoding() if kind == "bytes" else tokenizers.WordEncoding(["a", "b"]), file)
    facts = json.loads(file.read_text())
    odd = [None, 0, -1, 1.5, 1e400, True, "", "a", [], ["a"], [1], {}, [[]], {"a": "b"}, "\ud800", ["\ud800"], 10**400]
    changes = [{name: value} for name in facts for value in odd]
    changes += [{"tokens": [*facts["tokens"][:-1], value]} for value in odd]
    for change in changes:
        file.write_text(json.dumps({name: value for name, value in (facts | change).items() if value != {}}))
        try:
            loaded = tokenizers.load(file)
        except ValueError as error:
            assert "t.json" in str(error)
        else:
            tokenizers.fingerprint(loaded)
            assert change.keys() & {"name", "tokens", "pattern", "end_of_text"}
    whole = json.dumps(facts).encode()
    for _ in range(100):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data)
        try:
            tokenizers.load(file)
        except ValueError as error:
            assert "t.json" in str(error)


@pytest.mark.parametrize("size", [256, 0, -1, 2**20 + 1, float("nan")])
def test_vocabularies_of_no_size_are_refused_before_anything_is_read(size):
    with pytest.raises(ValueError, match="vocab_size must be 257"):
        tokenizers.train_bpe((pytest.fail("read") for _ in range(1)), size)
