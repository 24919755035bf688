"""Exported tokenizers give the ids of ours, in `transformers`' own class."""

import json
from itertools import islice

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from cratelab.corpora import tokenizers
from cratelab.corpora.prepare import tinyworld_encoding
from cratelab.corpora.pydocs import standard_library
from cratelab.corpora.tinyworld import generate
from cratelab.experiments.reference_models import load_reference_tokenizer
from cratelab.huggingface.tokenizer import to_transformers

BPE = load_reference_tokenizer()
EXPORTED = {tokenizer.name: to_transformers(tokenizer, 256) for tokenizer in (BPE, tokenizers.byte_encoding())}
PIECES = st.sampled_from(
    ["Don't", " we'll", "\r\n", "\n\n  ", "\t", " ", "   ", "1999", "漢字", "é", "e\u0301", "👩‍👧", "\x00", "_x"]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join)))
def test_ids_are_those_of_tiktoken_and_text_comes_back(text):
    for ours in BPE, tokenizers.byte_encoding():
        theirs = EXPORTED[ours.name]
        ids = theirs(text, split_special_tokens=True).input_ids
        assert ids == ours.encode_ordinary(text)
        assert theirs.decode(ids) == text


def test_long_text_has_the_same_ids():
    text = "\n".join(document.text for document in islice(standard_library(), 20))
    assert EXPORTED[BPE.name](text).input_ids == BPE.encode_ordinary(text)


def test_merges_are_those_that_training_made():
    trained = tokenizers.train_library_bpe((document.text for document in islice(standard_library(), 10)), 700)
    merges = json.loads(trained.to_str())["model"]["merges"]
    again = to_transformers(tokenizers.from_library(trained, "bpe"), 64)
    assert len(merges) == 443 and json.loads(again.backend_tokenizer.to_str())["model"]["merges"] == merges
    assert to_transformers(trained, 64).get_vocab() == again.get_vocab()


@pytest.mark.parametrize("ours", [BPE, tokenizers.byte_encoding()], ids=lambda ours: ours.name)
def test_what_a_saved_one_knows(tmp_path, ours):
    to_transformers(ours, 77).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.n_vocab and theirs.model_max_length == 77
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == ours.eot_token
    assert theirs.decode([ours.eot_token, *ours.encode_ordinary("it is")], skip_special_tokens=True) == "it is"
    padded = theirs(["a b c d e f", "a"], padding=True, return_tensors="pt")
    assert padded.attention_mask[1, 0] == 0 and padded.attention_mask[1, -1] == 1
    assert theirs("a<|endoftext|>b").input_ids == [
        *ours.encode_ordinary("a"),
        ours.eot_token,
        *ours.encode_ordinary("b"),
    ]


def test_words(tmp_path):
    ours = tinyworld_encoding()
    to_transformers(ours, 128).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = ours.decode(generate(2000).tokens)
    assert theirs(text).input_ids == ours.encode_ordinary(text)
    assert theirs.decode(theirs(text).input_ids) == ours.decode(ours.encode_ordinary(text))
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot_token
    with pytest.raises(Exception, match="Missing \\[UNK\\]"):
        theirs("Schrödinger")


def test_another_pattern_and_several_special_tokens():
    pattern = (  # that of cl100k_base
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
        r"\s+(?!\S)|\s"
    )
    special = {"<|endoftext|>": 4100, "<|fim|>": 4105}
    ours = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=BPE._mergeable_ranks, special_tokens=special)
    theirs = to_transformers(ours, 64)
    text = "Don't  STOP 12345\n\n  x = 3  \n"
    assert theirs(text).input_ids == ours.encode_ordinary(text)
    assert theirs("<|fim|>a<|endoftext|>").input_ids == ours.encode("<|fim|>a<|endoftext|>", allowed_special="all")


def test_a_pattern_that_the_library_reads_otherwise_is_refused():
    ours = tiktoken.Encoding(
        "odd",
        pat_str=r"\S+(?=\n)|^\s+|[\s\S]",
        mergeable_ranks=BPE._mergeable_ranks,
        special_tokens={"<|endoftext|>": 4095},
    )
    with pytest.raises(ValueError, match="would read other tokens than 'odd'"):
        to_transformers(ours, 64)


def test_ranks_of_no_bpe_are_refused():
    ranks = {bytes([value]): value for value in range(256)} | {b"abcd": 256}
    ours = tiktoken.Encoding("odd", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    with pytest.raises(ValueError, match="no merge of two tokens makes the token b'abcd'"):
        to_transformers(ours, 64)


def test_a_library_tokenizer_without_an_end_of_text_has_none():
    library = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    theirs = to_transformers(library, 8)
    assert theirs.eos_token_id is None and theirs("ab").input_ids == [0, 1]


def bytes_and(tokens=(), pattern=r"[\s\S]", **special):
    ranks = {bytes([value]): value for value in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("odd", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def test_a_dollar_sign_in_a_pattern_is_itself():
    ours = bytes_and([b"$5", b"a$"], r"[^$]+|\$")
    assert to_transformers(ours, 64)("a$5").input_ids == ours.encode_ordinary("a$5") == list(b"a$5")


def test_a_pattern_that_the_library_does_not_know_is_refused():
    with pytest.raises(ValueError, match="does not know the pattern of 'odd'"):
        to_transformers(bytes_and(pattern="(?s:.)"), 64)


def test_an_encoding_without_an_end_of_text_has_none():
    theirs = to_transformers(bytes_and(), 8)
    assert theirs.eos_token_id is None and theirs("ab").input_ids == [97, 98]
    assert to_transformers(bytes_and(**{"<|stop|>": 256}), 8).eos_token_id is None
