import json

import numpy as np
import pytest

from cratelab.corpora import prepare as module
from cratelab.corpora.documents import Document, split_of
from cratelab.corpora.prepare import prepare, vocabulary_size


def texts(n: int = 400) -> list[str]:
    return [f"document {i} says {i * i} and then {i % 7} words about nothing" for i in range(n)]


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps({"text": text, "meta": {"domain": "d"}}) + "\n" for text in rows))


def decoded(corpus, tokenizer) -> list[str]:
    return [tokenizer.decode(corpus.document(i)[:-1].tolist()) for i in range(corpus.n_documents)]


def test_tinyworld_is_split_by_document_and_knows_its_floor():
    corpus = prepare("tinyworld", characters=200_000, context=128)
    assert 0.85 < len(corpus.training) / 40_000 < 0.95 and 500 < len(corpus.validation) < 4000
    assert 0.5 < corpus.floor < 1.0
    words = [corpus.tokenizer.decode(corpus.training.document(i).tolist()) for i in range(50)]
    assert all(text.startswith("<begin> ") and text.endswith(" <end>") for text in words)
    assert max(len(corpus.training.document(i)) for i in range(corpus.training.n_documents)) <= 128


def test_a_file_is_split_by_hash_and_read_from_the_cache_the_second_time(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "all.jsonl", texts())
    first = prepare(str(tmp_path / "all.jsonl"), "bpe-300", cache=tmp_path / "cache")
    assert decoded(first.training, first.tokenizer) == [t for t in texts() if split_of(t) == "train"]
    assert decoded(first.validation, first.tokenizer) == [t for t in texts() if split_of(t) == "validation"]
    assert first.tokenizer.n_vocab == 300 and first.floor is None
    monkeypatch.setattr(module, "tokenize", lambda *args, **more: pytest.fail("tokenised again"))
    monkeypatch.setattr(module.tokens, "train_bpe", lambda *args: pytest.fail("trained again"))
    again = prepare(str(tmp_path / "all.jsonl"), "bpe-300", cache=tmp_path / "cache")
    assert np.array_equal(again.training[:], first.training[:])


def test_a_folder_with_splits_keeps_them(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", texts(50))
    write_jsonl(folder / "validation.jsonl", ["held out"])
    corpus = prepare(str(folder), "bytes", cache=tmp_path / "cache")
    assert decoded(corpus.training, corpus.tokenizer) == texts(50)
    assert decoded(corpus.validation, corpus.tokenizer) == ["held out"]


def test_corpora_are_joined_and_limited(tmp_path):
    for name, letter in ("a", "x"), ("b", "y"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [letter * 10] * 10)
        write_jsonl(tmp_path / name / "validation.jsonl", [letter * 9])
    both = f"{tmp_path / 'a'}+{tmp_path / 'b'}"
    corpus = prepare(both, "bytes", characters=145, cache=tmp_path / "cache")
    assert decoded(corpus.training, corpus.tokenizer) == ["x" * 10] * 10 + ["y" * 10] * 5


def test_python_documentation_by_name(tmp_path, monkeypatch):
    documents = [Document(text, {"domain": "re"}) for text in texts()]
    monkeypatch.setitem(module._PYTHON, "pydocs", lambda: iter(documents))
    corpus = prepare("pydocs", "bytes", cache=tmp_path)
    assert decoded(corpus.training, corpus.tokenizer) == [t for t in texts() if split_of(t) == "train"]
    assert corpus.training.domain(0) == "re"


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CRATELAB_CACHE", str(tmp_path / "elsewhere"))
    write_jsonl(tmp_path / "all.jsonl", texts())
    prepare(str(tmp_path / "all.jsonl"), "bytes")
    assert [path.name.split("-")[0] for path in (tmp_path / "elsewhere").iterdir()] == ["all.jsonl"]


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        ("shakespeare", None, "no corpus 'shakespeare': give tinyworld, pydocs, packages, wikitext, tinystories, pile"),
        ("tinyworld", "gpt2", "tinyworld stands alone, and its tokens are words"),
        ("tinyworld+pydocs", None, "tinyworld stands alone"),
        ("pydocs", "bpe-many", '"gpt2", "bytes" or "bpe-N", such as bpe-4096; got \'bpe-many\''),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_read(name, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        prepare(name, tokenizer)


def test_without_the_hub_it_says_what_to_do(tmp_path, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)  # the variable of that name is read on import only
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="hf download"):
        prepare("pile", "bytes", cache=tmp_path)


def test_vocabulary_sizes_are_known_before_anything_is_read(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", texts())
    for name, tokenizer in (
        ("tinyworld", None),
        (str(tmp_path / "all.jsonl"), "bpe-300"),
        (str(tmp_path / "all.jsonl"), "bytes"),
    ):
        corpus = prepare(name, tokenizer, characters=50_000, cache=tmp_path / "cache")
        assert vocabulary_size(name, tokenizer) == corpus.training.n_vocab == corpus.tokenizer.n_vocab
    assert vocabulary_size("pile") == 50_257


def test_a_folder_of_tokens_is_opened_as_it_is(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", texts())
    made = prepare(str(tmp_path / "all.jsonl"), "bpe-300", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    carried = folder.rename(tmp_path / "carried")
    (tmp_path / "all.jsonl").unlink()
    opened = prepare(str(carried))
    assert vocabulary_size(str(carried)) == opened.tokenizer.n_vocab == 300
    assert decoded(opened.validation, opened.tokenizer) == decoded(made.validation, made.tokenizer)


def test_validation_takes_at_most_a_twentieth(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["x" * 10] * 100)
    write_jsonl(folder / "validation.jsonl", ["y" * 10] * 100)
    corpus = prepare(str(folder), "bytes", characters=400, cache=tmp_path / "cache")
    assert (corpus.training.n_documents, corpus.validation.n_documents) == (40, 2)
