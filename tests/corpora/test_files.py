import gzip
import json
import os
import random
import tracemalloc
import warnings
from pathlib import Path

import pytest

from cratelab.corpora import files
from cratelab.corpora.files import LocalDocuments, MalformedLine, SkippedLine, as_document, split_named_by

pyarrow = pytest.importorskip("pyarrow", reason="the extra `corpora` is not installed")

DATA = Path(os.environ.get("CRATELAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
ROWS = [
    {"text": "One.", "meta": {"pile_set_name": "Github"}},
    {"text": "Zwei – ü\n", "meta": {"domain": "law", "pile_set_name": "FreeLaw", "year": 1999}, "title": "T"},
    {"text": ""},
]
MALFORMED = [b'{"text": "Four."', b"[1, 2]", b'{"txt": "Five."}', b'{"text": 6}', b"\xff\xfe", b"[" * 100_000]


def jsonl(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zst(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def as_written(file: Path, data: bytes) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else zst(data) if file.suffix == ".zst" else data)
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".JSONL.GZ", ".ndjson"])
def test_rows_become_documents_with_their_domain(tmp_path, ending):
    file = tmp_path / f"name{ending}"
    file.write_bytes(
        {"gz": gzip.compress, "zst": zst}.get(ending.lower().split(".")[-1], bytes)(b"\xef\xbb\xbf" + jsonl() + b"\n")
    )
    corpus = LocalDocuments(file)
    one, two, three = corpus
    assert one.text == "One." and one.meta == {"pile_set_name": "Github", "domain": "Github"}
    assert two.text == "Zwei – ü\n"
    assert two.meta == {"domain": "law", "pile_set_name": "FreeLaw", "year": "1999", "title": "T"}
    assert three.text == "" and three.meta == {"domain": "name"}
    assert list(corpus) == [one, two, three], "a second iteration starts anew"
    assert [document.meta["domain"] for document in LocalDocuments(file, domain="mine")] == ["Github", "law", "mine"]


def test_compressed_files_may_be_joined(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl()) * 2)
    (tmp_path / "a.jsonl.zst").write_bytes(zst(jsonl()) * 2)
    assert len(list(LocalDocuments(tmp_path))) == 12


def test_parquet_and_text_files(tmp_path):
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"text": f"Row {i}.", "meta": {"pile_set_name": "Github"}} for i in range(600)])
    parquet.write_table(table, tmp_path / "rows.parquet")
    as_written(tmp_path / "essay.txt.gz", b"Ein Text,\nzwei Zeilen.\n")
    documents = list(LocalDocuments(tmp_path))
    assert documents[0].text == "Ein Text,\nzwei Zeilen.\n" and documents[0].meta == {"domain": "essay"}
    assert [document.text for document in documents[1:]] == [f"Row {i}." for i in range(600)]
    assert documents[1].meta["domain"] == "Github"


def test_a_split_of_a_folder_is_the_files_that_bear_its_name(tmp_path):
    names = ["train/00.jsonl", "train/01.jsonl.zst", "val.jsonl", "test-00000-of-00001.jsonl", "notes.pdf"]
    for name in names:
        as_written(tmp_path / name, jsonl([{"text": name}]))
    texts = {split: [d.text for d in LocalDocuments(tmp_path, split)] for split in ("train", "validation", "test")}
    assert texts == {"train": names[:2], "validation": names[2:3], "test": names[3:4]}
    assert len(list(LocalDocuments(tmp_path))) == 4
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no file of the split 'validation'"):
        LocalDocuments(tmp_path, "validation")


@pytest.mark.parametrize("bad", MALFORMED)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_malformed_line_stops_the_reading_and_is_named(tmp_path, bad, ending):
    file = as_written(tmp_path / f"rows{ending}", b"\n" + jsonl() + bad + b"\n" + jsonl())
    documents = iter(LocalDocuments(file))
    assert [next(documents).text for _ in ROWS] == [row["text"] for row in ROWS]
    with pytest.raises(MalformedLine, match=rf"rows{ending}, line 5: .*on_error=\"skip\""):
        next(documents)


def test_skipped_lines_are_counted_and_reported(tmp_path):
    file = as_written(tmp_path / "rows.jsonl", jsonl() + b"\n".join(MALFORMED) + b"\n" + jsonl())
    corpus = LocalDocuments(file, on_error="skip")
    with pytest.warns(
        UserWarning, match=r"rows.jsonl: 6 malformed lines skipped \(4, 5, 6, 7, 8, 9\); the first is not"
    ):
        assert len(list(corpus)) == 6
    assert corpus.n_skipped == 6
    assert corpus.skipped[2] == SkippedLine(str(file), 6, "has no text: the field 'text' is missing among txt")
    assert [skipped.line for skipped in corpus.skipped] == [4, 5, 6, 7, 8, 9]
    as_written(file, b"{\n" * 1000)
    with pytest.warns(UserWarning, match=r"1000 malformed lines skipped \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …\)"):
        assert list(corpus) == []
    assert corpus.n_skipped == 1000 and len(corpus.skipped) == 100, "memory stays constant"


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
def test_a_damaged_file_is_never_taken_for_a_short_one(tmp_path, ending):
    file = as_written(tmp_path / f"rows{ending}", jsonl([{"text": str(i) * 50} for i in range(5000)]))
    whole = file.read_bytes()
    damaged = {"cut": whole[:-4], "cut in half": whole[: len(whole) // 2], "other": b"something else", "empty": b""}
    for data in damaged.values():
        file.write_bytes(data)
        for on_error in "raise", "skip":
            with pytest.raises(ValueError, match=rf"rows{ending} is damaged or cut off.*download it again"):
                list(LocalDocuments(file, on_error=on_error))


def test_a_damaged_parquet_file_and_text_that_is_none_are_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read as Parquet"):
        list(LocalDocuments(tmp_path))
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: a row has no text: .*missing among content"):
        list(LocalDocuments(tmp_path))
    assert [d.text for d in LocalDocuments(tmp_path, text="content")] == ["a"]
    (tmp_path / "rows.parquet").unlink()
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        list(LocalDocuments(tmp_path))


def test_what_cannot_be_read_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        LocalDocuments(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no file; known are \.jsonl"):
        LocalDocuments(tmp_path)
    (tmp_path / "rows.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"rows.csv is of no known kind; known are \.jsonl"):
        LocalDocuments(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="on_error"):
        LocalDocuments(tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match="'dev'"):
        LocalDocuments(tmp_path, split="dev")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    file = as_written(tmp_path / "rows.jsonl", jsonl())
    corpus = LocalDocuments(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        list(corpus)


def test_facts_without_text_or_meta_are_kept_as_text():
    document = as_document({"text": "a", "meta": "note", "n": 3, "none": None, "list": [1]}, domain="d")
    assert document.meta == {"n": "3", "list": "[1]", "meta": "note", "domain": "d"}


def test_memory_does_not_grow_with_the_file(tmp_path):
    file = as_written(tmp_path / "rows.jsonl.gz", jsonl([{"text": "x" * 1000}] * 20_000))
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in LocalDocuments(file)) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data here; CRATELAB_DATA names another place")
def test_real_files_in_the_form_of_the_pile():
    from datasets import load_dataset

    corpus = LocalDocuments(DATA / "pile_like", "validation")
    with warnings.catch_warnings(action="error"):
        documents = list(corpus)
    rows = load_dataset("json", data_files=str(DATA / "pile_like/val.jsonl.zst"), split="train", streaming=True)
    assert [(d.text, d.meta["domain"]) for d in documents] == [(r["text"], r["meta"]["pile_set_name"]) for r in rows]
    assert len({document.meta["domain"] for document in documents}) > 3
    assert LocalDocuments(DATA / "corpora" / "legal", "test").files[0].name == "test.jsonl.gz"
    (wikitext,) = LocalDocuments(DATA / "wikitext/hf_rows/wikitext-2-v1", "test").files
    assert "".join(d.text for d in LocalDocuments(wikitext)).startswith(" = Robert <unk> = \n")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[
            (name, "train")
            for name in ("train.jsonl", "wiki.train.raw", "train_0.txt", "owt_train/0.txt", "TRAIN-1.md")
        ],
        *[(name, "train") for name in ("training/a.txt", "trainset2.jsonl", "trainData.json", "a train.txt", "train0")],
        *[(name, "validation") for name in ("valid.txt", "owt_valid.jsonl", "Val/00.txt", "x-dev.jsonl.gz", "eval1")],
        *[(name, "test") for name in ("flores.devtest", "tst2013.txt", "valtest.jsonl")],
        *[
            (name, "validation")
            for name in ("validate.jsonl", "validation-00000-of-00001.parquet", "train/val.txt", "dev_set.txt")
        ],
        *[
            (name, "test")
            for name in ("test.jsonl", "wiki.test.raw", "a/testing/b.txt", "testset.txt", "x_test_3.json")
        ],
        *[(name, "test") for name in ("test/train.txt", "train/held-out.txt", "2test2.txt", "TestSet.txt")],
        *[
            (name, None)
            for name in ("latest.jsonl", "contest.txt", "data.json", "retrained.txt", "values.md", "étest.md")
        ],
    ],
)
def test_a_split_is_named_by_a_word(name, split):
    assert split_named_by(name) == split


def test_files_without_a_split_are_for_training_where_others_have_one(tmp_path):
    for name in "data.jsonl", "latest.jsonl", "val.jsonl":
        as_written(tmp_path / name, jsonl([{"text": name}]))
    assert [d.text for d in LocalDocuments(tmp_path, "train")] == ["data.jsonl", "latest.jsonl"]
    as_written(tmp_path / "train.jsonl", jsonl([{"text": "train"}]))
    assert [d.text for d in LocalDocuments(tmp_path, "train")] == ["train"]
    for name in "data.jsonl", "latest.jsonl", "train.jsonl":
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="no file of the split 'train' among its 1"):
        LocalDocuments(tmp_path, "train")


def test_links_are_followed_and_what_is_hidden_or_about_the_data_is_left_out(tmp_path):
    folder = tmp_path / "corpus"
    for name in ("a/one.txt", "README.md", "a/LICENSE-MIT.txt", "dataset_infos.json", ".b/two.txt", "a/.c.txt"):
        as_written(folder / name, b"x")
    for name in (
        "a/notice_of_appeal.txt",
        "citations.md",
        "a/readme.md",
        "LICENSE_2.md",
        "a/license.txt",
        "license_plates.md",
    ):
        as_written(folder / name, b"x")
    as_written(folder / ".ipynb_checkpoints" / "one-checkpoint.txt", b"x")
    as_written(tmp_path / "elsewhere" / "three.txt", b"x")
    as_written(tmp_path / "four.bin", b"x")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "four.txt").symlink_to(tmp_path / "four.bin")
    (folder / "a" / "again").symlink_to(folder)
    (folder / "0alias").symlink_to(folder / "a")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "gone.txt").symlink_to(folder / "removed")
    found = [file.relative_to(folder).as_posix() for file in LocalDocuments(folder).files]
    prose = "a/notice_of_appeal.txt", "citations.md", "license_plates.md"
    assert found == sorted(["a/one.txt", "four.txt", "linked/three.txt", *prose])
    as_written(tmp_path / "docs" / "README.md", b"x")
    assert len(LocalDocuments(tmp_path / "docs").files) == 1, "there is no other"


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    as_written(tmp_path / "rows.jsonl", jsonl())
    assert len(list(LocalDocuments("~/rows.jsonl"))) == 3


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"Line {i} of a book.\n" + "\n" * (i % 30 == 0) for i in range(3000)),
        "no end of a line " * 3000,
        "x" * 30_000,
        "\r\n".join(["ü" * 50, ""] * 1000),
        "\n" * 30_000,
        "x" * 8192,
        "of two documents\n" * 300,
        "short\n",
        "",
    ],
)
def test_a_long_text_is_cut_into_documents_that_join_to_it(tmp_path, text):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    documents = [document.text for document in LocalDocuments(tmp_path / "book.txt")]
    assert "".join(documents) == text and "" not in documents
    assert len(documents) >= len(text) / 8192 and all(4096 < len(document) <= 8192 for document in documents[:-1])
    for document in documents[:-1]:
        assert document.endswith("\n" if "\n" in text else (" ", "x"))


def test_a_text_that_unpacks_without_end_is_streamed(tmp_path):
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(bytes(1_000_000))
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in LocalDocuments(tmp_path)) == 40_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_rows_of_parquet_are_unpacked_a_few_at_a_time(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["x" * 100_000] * 600}), tmp_path / "bomb.parquet")
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in LocalDocuments(tmp_path)) == 60_000_000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_line_without_end_is_a_malformed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LONGEST_LINE", 1000)
    as_written(tmp_path / "rows.jsonl.gz", jsonl() + b"[" * 200_000 + b"\n" + jsonl() + b'{"text": "' + b"a" * 5000)
    with pytest.raises(MalformedLine, match=r"rows.jsonl.gz, line 4: is longer than 1000 bytes"):
        list(LocalDocuments(tmp_path))
    corpus = LocalDocuments(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match=r"2 malformed lines skipped \(4, 8\)"):
        assert len(list(corpus)) == 6


def test_a_row_of_parquet_without_text_is_named_or_skipped(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "rows.parquet")
    with pytest.raises(MalformedLine, match=r"rows.parquet, row 2: has no text: the field 'text' is null"):
        list(LocalDocuments(tmp_path))
    corpus = LocalDocuments(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match=r"rows.parquet: 1 malformed lines skipped \(2\)"):
        assert [document.text for document in corpus] == ["a", "b"]
    assert corpus.skipped == [SkippedLine(str(tmp_path / "rows.parquet"), 2, "has no text: the field 'text' is null")]


def test_one_bad_file_is_named_and_not_fatal_to_the_rest_if_it_may_be_skipped(tmp_path):
    from pyarrow import parquet

    good = [as_written(tmp_path / name, jsonl()) for name in ("0.jsonl", "5.jsonl", "9.jsonl")]
    bad = {
        "1.jsonl.gz": gzip.compress(jsonl())[:-9],
        "2.txt": b"\xff\xfe",
        "4.parquet": b"PAR1PAR1",
        "6.jsonl.zst": b"z",
        "7.txt.gz": b"",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "3.parquet")
    with pytest.warns(UserWarning) as warned:
        documents = list(LocalDocuments(tmp_path, on_error="skip"))
    assert len(documents) in (9, 12), "of the file that is cut off, as much as was read"
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 6 and all(message.endswith("The rest of this file is skipped") for message in messages)
    assert all(name in message for name, message in zip(sorted([*bad, "3.parquet"]), messages, strict=True))
    for file in good:
        file.unlink()
    with pytest.raises(ValueError, match=r"7.txt.gz"), warnings.catch_warnings(action="ignore"):
        list(LocalDocuments(tmp_path, on_error="skip"))


def test_a_window_too_large_is_not_called_damage(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="writes what no other here can")
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    (tmp_path / "rows.jsonl.zst").write_bytes(packer.compress(jsonl()) + packer.flush())
    with pytest.raises(ValueError, match=r"rows.jsonl.zst is packed with a window above 128 MiB .*zstd -d --long=31"):
        list(LocalDocuments(tmp_path))


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "text.txt", "text.txt.gz", "rows.parquet"]
)
def test_of_changed_bytes_only_errors_that_name_the_file_come_out(tmp_path, name):
    file, draw = tmp_path / name, random.Random(name)
    if name == "rows.parquet":
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([{"text": f"Row {i}.", "n": {"a": i}} for i in range(50)]), file)
    else:
        as_written(file, jsonl(ROWS * 5))
    whole = file.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.choice([0, 0xFF, 0x22, 0x7B, draw.randrange(256)])
        file.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        for on_error in "raise", "skip":
            try:
                with warnings.catch_warnings(action="ignore"):
                    documents = list(LocalDocuments(file, on_error=on_error))
                assert all(isinstance(document.text, str) for document in documents)
            except (ValueError, OSError) as error:
                assert name in str(error)
