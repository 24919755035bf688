import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cratelab.corpora import prepare as module
from cratelab.corpora import sources, tokenizers
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
    words = corpus.tokenizer.vocabulary
    assert words[corpus.tokenizer.eot_token] == "<end>" and "\\n" in words and "\n" not in words
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
    monkeypatch.setattr(module.tokenizers, "train_bpe", lambda *args: pytest.fail("trained again"))
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


def held(folder, name, rows):
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / name, rows)
    return rows


def splits(path, tmp_path, **options) -> tuple[list[str], list[str]]:
    corpus = prepare(str(path), "bytes", cache=tmp_path / "cache", **options)
    return decoded(corpus.training, corpus.tokenizer), decoded(corpus.validation, corpus.tokenizer)


def hashed(rows: list[str], split: str) -> list[str]:
    return [text for text in rows if split_of(text) == split]


def test_a_missing_validation_is_cut_from_the_training_files_alone(tmp_path):
    rows = held(tmp_path / "c", "train.jsonl", texts(400))
    held(tmp_path / "c", "test.jsonl", texts(500)[380:])
    training, validation = splits(tmp_path / "c", tmp_path)
    assert validation == hashed(rows, "validation")
    assert training == hashed(rows[:380], "train"), "twenty stand in test, too"


@pytest.mark.parametrize("names", [("data.jsonl", "val.jsonl"), ("owt_train.jsonl", "owt_valid.jsonl")])
def test_what_is_not_named_for_a_split_is_trained_on_whole_but_for_what_is_held_out(tmp_path, names):
    for name, rows in zip(names, (texts(400), texts(500)[390:]), strict=True):
        held(tmp_path / "c", name, rows)
    assert splits(tmp_path / "c", tmp_path) == (texts(390), texts(500)[390:])


def test_files_that_are_joined_are_as_in_one_folder(tmp_path):
    a, b, c, d = (str(tmp_path / f"{name}.jsonl") for name in ("a_train", "a_val", "b", "a_test"))
    for path, rows in {a: texts(300), b: texts(320)[290:], c: texts(340)[310:], d: texts(10)}.items():
        write_jsonl(Path(path), rows)
    assert splits(f"{a}+{b}+{c}+{d}", tmp_path) == (texts(290)[10:] + texts(340)[320:], texts(320)[290:])
    training, validation = splits(f"{a}+{d}", tmp_path)
    assert (training, validation) == (hashed(texts(300)[10:], "train"), hashed(texts(300), "validation"))
    assert splits(b, tmp_path)[0], "a file alone is what is asked for"
    with pytest.raises(ValueError, match="no text to train on"):
        splits(f"{b}+{d}", tmp_path)


def test_only_held_out_files_are_nothing_to_train_on(tmp_path):
    held(tmp_path / "c", "wiki.test.jsonl", texts(100))
    with pytest.raises(FileNotFoundError, match="no file of the split 'train' among its 1"):
        prepare(str(tmp_path / "c"), "bytes", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_one_corpus_holds_out_another_does_not_train_on(tmp_path, monkeypatch):
    documents = [Document(text, {}) for text in texts(300)]
    monkeypatch.setitem(module._PYTHON, "pydocs", lambda: iter(documents))
    held(tmp_path / "c", "train.jsonl", texts(350))
    held(tmp_path / "c", "dev.jsonl", texts(20))
    held(tmp_path / "c", "test.jsonl", texts(40)[20:])
    training, validation = splits(f"pydocs+{tmp_path / 'c'}", tmp_path)
    assert validation == [*hashed(texts(300), "validation"), *texts(20)]
    assert set(training) == set(texts(350)[40:]) - {*validation, *hashed(texts(300), "test")}


@pytest.mark.parametrize("rows", [texts(7), ["a", "b"], ["  ", "", "a", "a", "b"]])
def test_a_corpus_too_small_for_chance_has_one_text_to_validate_on(tmp_path, rows):
    held(tmp_path / "c", "rows.jsonl", rows)
    training, validation = splits(tmp_path / "c", tmp_path)
    assert len(set(validation)) == 1 and training and not set(training) & set(validation)
    assert set(training + validation) <= set(rows) - {"", "  "}


def test_of_one_text_it_is_said_that_two_are_needed(tmp_path):
    held(tmp_path / "c", "rows.jsonl", ["alone", "alone", ""])
    with pytest.raises(ValueError, match=r"no text to train on.*two documents at least, or a folder"):
        splits(tmp_path / "c", tmp_path)


def test_one_long_text_can_be_trained_on(tmp_path):
    book = "".join(f"Chapter {i}. It was the {i}th of many evenings.\n\n" for i in range(3000))
    (tmp_path / "book.txt").write_text(book)
    training, validation = splits(tmp_path / "book.txt", tmp_path)
    assert sum(map(len, training)) > 0.5 * len(book) and len(validation[0]) > 4000
    assert all(text in book for text in training + validation) and not set(training) & set(validation)


def test_paths_may_hold_a_plus_and_home_and_are_never_taken_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in "c++", "a", "b", "a+b", "pile":
        held(tmp_path / name, "train.jsonl", [f"{name} {i}" for i in range(3)])
        held(tmp_path / name, "val.jsonl", [f"held {name}"])
    for path, names in {
        "c++": ["c++"],
        "~/c++": ["c++"],
        "a+b": ["a+b"],
        "a+./b": ["a", "b"],
        f"a+{tmp_path}/c+++b": ["a", "c++", "b"],
        "~/a+b+~/b": ["a+b", "b"],
        "./pile": ["pile"],
    }.items():
        assert splits(path, tmp_path)[1] == [f"held {name}" for name in names]
    assert prepare(tmp_path / "a+b", "bytes", cache="~/cache").training.n_documents == 3
    assert vocabulary_size("~/c++", "bytes") == 257 and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "name", ["", "pydocs+", "+pydocs", "pydocs++packages", "+", "pydocs+nowhere", "a\0b", "a" * 5000]
)
def test_an_empty_part_is_not_the_current_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    for call in prepare, vocabulary_size:
        with pytest.raises(ValueError, match="no corpus '"):
            call(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"characters": wrong}, "characters and context must be at least 1") for wrong in (0, -5, np.nan, np.inf)],
        *[({"context": wrong}, "characters and context must be at least 1") for wrong in (0, -1, np.nan, np.inf)],
        ({"name": "tinyworld", "context": 10**11}, "context <= "),
        ({"name": "tinyworld", "characters": 1}, "generate more"),
        *[({"tokenizer": f"bpe-{n}"}, "must be 257 to 1,048,576") for n in (1, 256, 2**20 + 1)],
        *[({"tokenizer": f"bpe-{n}"}, "such as bpe-4096") for n in ("0", "-5", "²", "٣٠٠", "", "9" * 5000, "1e3")],
    ],
)
def test_sizes_that_are_none_are_refused_before_anything_is_read(monkeypatch, options, message):
    monkeypatch.setattr(module.tokenizers, "train_bpe", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        prepare(**{"name": "pydocs"} | options)


@pytest.mark.parametrize("hashed_whole", [2**30, 0])
def test_a_file_that_was_rewritten_is_read_again(tmp_path, monkeypatch, hashed_whole):
    monkeypatch.setattr(sources, "_HASHED_WHOLE", hashed_whole)
    for letter in "xyx":
        rows = held(tmp_path / "c", "train.jsonl", [letter * 9 + str(i) for i in range(9)])
        held(tmp_path / "c", "val.jsonl", ["held out"])
        assert splits(tmp_path / "c", tmp_path)[0] == rows
    assert len(list((tmp_path / "cache").iterdir())) == (2 if hashed_whole else 3)
    (tmp_path / "c" / "val.jsonl").rename(tmp_path / "c" / "dev.jsonl")
    assert splits(tmp_path / "c", tmp_path)[0] == rows
    (tmp_path / "c" / "train.jsonl").rename(tmp_path / "c" / "test.jsonl")
    with pytest.raises(FileNotFoundError, match="'train'"):
        splits(tmp_path / "c", tmp_path)


def test_other_tokenizers_sizes_and_versions_are_other_tokens(tmp_path, monkeypatch):
    documents = [Document(text, {}) for text in texts()]
    monkeypatch.setitem(module._PYTHON, "packages", lambda: iter(documents))
    monkeypatch.setattr(sources.pydocs, "SCIENTIFIC", ("einops",))

    def made(**options):
        return prepare(**{"name": "packages", "tokenizer": "bytes", "cache": tmp_path} | options).training.n_documents

    whole = made()
    documents = documents[:200]
    assert made() == whole, "nothing says that it changed"
    assert made(tokenizer="bpe-300") < whole and made(characters=10**6) < whole
    monkeypatch.setattr(sources.pydocs.metadata, "version", lambda name: "next")
    assert made() < whole
    documents = documents[:100]
    monkeypatch.setattr(module, "_EDITION", 10**6)
    assert made() < 100


def test_a_folder_in_the_cache_that_was_made_of_something_else_is_refused(tmp_path):
    held(tmp_path / "c", "rows.jsonl", texts())
    splits(tmp_path / "c", tmp_path)
    (file,) = (tmp_path / "cache").glob("*/made_of.json")
    was = file.read_text()
    for spoilt in was.replace('"edition": ', '"edition": 1'), was[:50], None:
        file.unlink() if spoilt is None else file.write_text(spoilt)
        with pytest.raises(ValueError, match=rf"{file.parent.name} was not made of .*made_of.json.* Remove it"):
            splits(tmp_path / "c", tmp_path)
    file.write_text(was)
    file.with_name("tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{file.parent.name} was not made of .*tokenizer.json.* Remove it"):
        splits(tmp_path / "c", tmp_path)


def test_a_folder_of_tokens_of_another_tokenizer_or_half_of_one_is_refused(tmp_path):
    held(tmp_path / "c", "rows.jsonl", texts())
    splits(tmp_path / "c", tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    for call in prepare, vocabulary_size:
        with pytest.raises(ValueError, match="holds tokens of 'bytes', not of 'gpt2'"):
            call(str(folder), "gpt2")
    (folder / "validation" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds tokens, but validation is missing or unfinished"):
        prepare(str(folder))


def test_without_a_home_folder_it_says_what_to_set(tmp_path, monkeypatch):
    held(tmp_path / "c", "rows.jsonl", texts())

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CRATELAB_CACHE", raising=False)
    monkeypatch.setattr(module.Path, "home", no_home)
    with pytest.raises(OSError, match="set CRATELAB_CACHE to a folder"):
        prepare(str(tmp_path / "c"), "bytes")


def test_processes_that_need_the_same_tokens_make_them_once(tmp_path):
    held(tmp_path / "c", "rows.jsonl", texts(2000))
    code = f"""
from cratelab.corpora import prepare as module
from cratelab.corpora import sources, tokenizers
make = module.tokenize
module.tokenize = lambda *args, **more: make(*args, **more | {{"on_shard": lambda shard: print("made", flush=True)}})
corpus = module.prepare({str(tmp_path / "c")!r}, "bpe-300", cache={str(tmp_path / "cache")!r})
print(corpus.training.facts()["sha256"], corpus.validation.facts()["sha256"])
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=100)[0].split() for process in running]
    assert len({tuple(words[-2:]) for words in printed}) == 1
    assert sum(words.count("made") for words in printed) == 2, "one shard of training, one of validation"
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_of_an_installed_package_the_sources_tell(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources.pydocs, "SCIENTIFIC", ("mine",))
    for letter in "xyx":
        for i in range(9):
            (tmp_path / "mine" / f"m{i}.py").write_text(f'"""{letter} {i}"""')
        (tmp_path / "mine" / "__init__.py").touch()
        corpus = prepare("packages", "bytes", cache=tmp_path / "cache")
        assert {text[0] for text in decoded(corpus.training, corpus.tokenizer)} == {letter}


@pytest.mark.parametrize("names", [("train", "val"), ("train/", "val/"), ("a", "val"), ("a", "val/val_0.jsonl")])
def test_folders_that_are_joined_are_as_in_one_folder(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    for folder in "train", "a":
        held(tmp_path / folder, "part.jsonl", texts(300))
    held(tmp_path / "val", "val_0.jsonl", texts(330)[290:])
    assert splits("+".join(names), tmp_path) == (texts(290), texts(330)[290:])
    (tmp_path / "val").rename(tmp_path / "test")
    training, validation = splits(f"{names[0]}+test", tmp_path)
    assert (training, validation) == (hashed(texts(290), "train"), hashed(texts(300), "validation"))


def test_a_folder_of_splits_that_is_joined_keeps_them(tmp_path):
    for name, rows in {"train.jsonl": texts(300), "dev.jsonl": texts(310)[300:], "test.jsonl": texts(10)}.items():
        held(tmp_path / "c", name, rows)
    held(tmp_path / "test", "part.jsonl", texts(20))
    expected = texts(300)[20:], texts(310)[300:]
    assert splits(f"{tmp_path / 'c'}+{tmp_path / 'test'}", tmp_path) == expected


def test_files_that_are_left_out_beside_those_for_training_are_named(tmp_path):
    held(tmp_path / "c", "training_plan.jsonl", texts(50))
    held(tmp_path / "c", "diary.jsonl", texts(90)[50:])
    with pytest.warns(UserWarning, match=r"1 files .* named for no split are left out, such as diary.jsonl"):
        training, validation = splits(tmp_path / "c", tmp_path)
    assert not set(training + validation) & set(texts(90)[50:])


def test_other_names_of_a_joined_folder_are_other_tokens(tmp_path):
    held(tmp_path / "a", "part.jsonl", texts(300))
    held(tmp_path / "val", "part.jsonl", texts(330)[300:])
    assert splits(f"{tmp_path / 'a'}+{tmp_path / 'val'}", tmp_path)[1] == texts(330)[300:]
    (tmp_path / "val").rename(tmp_path / "b")
    assert splits(f"{tmp_path / 'a'}+{tmp_path / 'b'}", tmp_path)[1] == hashed(texts(330), "validation")


def test_a_tokenizer_from_a_file_reads_other_texts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts())
    write_jsonl(tmp_path / "b.jsonl", [text.upper() for text in texts()])
    first = prepare(str(tmp_path / "a.jsonl"), "bpe-300", cache=tmp_path / "cache")
    file = tmp_path / "mine.json"
    tokenizers.save(first.tokenizer, file)
    for tokenizer in file, str(file):
        second = prepare(str(tmp_path / "b.jsonl"), tokenizer, cache=tmp_path / "cache")
        assert tokenizers.fingerprint(second.tokenizer) == tokenizers.fingerprint(first.tokenizer)
        assert second.tokenizer.decode(second.training.document(0)[:-1].tolist()).isupper()
        assert vocabulary_size(str(tmp_path / "b.jsonl"), tokenizer) == 300
    again = prepare(str(tmp_path / "b.jsonl"), "bpe-300", cache=tmp_path / "cache")
    assert tokenizers.fingerprint(again.tokenizer) != tokenizers.fingerprint(first.tokenizer)
    with pytest.raises(ValueError, match="tinyworld stands alone"):
        prepare("tinyworld", file)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        prepare(str(tmp_path / "b.jsonl"), "none.json")
