import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cratelab.corpora import tokenizers
from cratelab.corpora.documents import Document
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.token_writer import tokenize

pytest.importorskip("tiktoken", reason="the extra `corpora` is not installed")

BYTES = tokenizers.byte_encoding()


def corpus(n: int = 50) -> list[Document]:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ü–", k=generator.randrange(300))) for _ in range(n - 1)]
    return [Document(text, {"domain": "abc"[i % 3]}) for i, text in enumerate([*texts, ""])]


def stream(documents: list[Document]) -> np.ndarray:
    """What the whole stream must be, made the plainest way."""
    return np.array([token for document in documents for token in [*document.text.encode(), 256]])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


@pytest.fixture
def made(tmp_path):
    return tokenize(corpus(), tmp_path / "made", BYTES, shard_characters=1000)


def test_the_stream_is_the_documents_each_with_its_end(made):
    whole = stream(corpus())
    assert len(made) == len(whole) and made.n_documents == 50 and made.n_vocab == 257
    np.testing.assert_array_equal(made[:], whole)
    assert made[:].dtype == np.uint16 and len(made.manifest["shards"]) > 5
    for start, stop in [(0, 1), (5, 5), (7, 3), (100, 4000), (-500, -3), (-(10**9), 10**9), (len(whole), None)]:
        np.testing.assert_array_equal(made[start:stop], whole[start:stop])
    assert made[0] == whole[0] and made[-1] == whole[-1] == 256 and made[4321] == whole[4321]
    with pytest.raises(IndexError):
        made[len(whole)]
    with pytest.raises(ValueError, match="step"):
        made[::2]


def test_documents_are_found_by_index(made):
    position = 0
    for i, document in enumerate(corpus()):
        text, end = BYTES.decode(made.document(i)[:-1].tolist()), position + len(document.text.encode()) + 1
        assert text == document.text and made.domain(i) == document.meta["domain"]
        assert made.document_span(i) == (position, end)
        position = end
    assert made.document_span(-1)[1] == len(made) and made.domain(-1) == "b"
    for method in made.document, made.domain, made.document_span:
        with pytest.raises(IndexError):
            method(len(made))


def test_random_windows_are_pieces_of_the_stream_from_anywhere(made):
    whole = stream(corpus())
    windows = made.random_windows(3000, 40, seed=[7, 1])
    assert windows.shape == (3000, 40) and windows.dtype == np.int64
    places = {whole[i : i + 40].tobytes(): i for i in range(len(whole) - 39)}
    starts = [places[window.tobytes()] for window in windows]
    assert np.ptp(starts) > 0.99 * (len(whole) - 40) and (windows[:, :-1] == 256).any()
    np.testing.assert_array_equal(windows, made.random_windows(3000, 40, seed=[7, 1]))
    assert (windows != made.random_windows(3000, 40, seed=[7, 2])).any()
    only = made.random_windows(3, len(whole), seed=0)
    np.testing.assert_array_equal(only, np.stack([whole] * 3))
    with pytest.raises(ValueError, match=f"does not fit a corpus of {len(whole)}"):
        made.random_windows(1, len(whole) + 1, seed=0)


def test_validation_windows_are_fixed_and_never_overlap(made):
    whole, n = stream(corpus()), len(made) // 64
    np.testing.assert_array_equal(made.validation_windows(64), whole[: n * 64].reshape(n, 64))
    some = made.validation_windows(64, 10)
    np.testing.assert_array_equal(some, made.validation_windows(64)[np.arange(10) * n // 10])
    for wrong in 0, n + 1:
        with pytest.raises(ValueError, match=f"1 to {n} windows of 64; asked for {wrong}"):
            made.validation_windows(64, wrong)


def test_a_corpus_in_memory_reads_like_one_on_disk(made):
    whole, lengths = stream(corpus()), [len(document.text.encode()) + 1 for document in corpus()]
    domains = [document.meta["domain"] for document in corpus()]
    document = np.repeat(np.arange(50, dtype=np.uint32), lengths)
    memory = TokenizedCorpus.from_arrays(whole, document, domains, 257)
    np.testing.assert_array_equal(memory.random_windows(9, 33, 5), made.random_windows(9, 33, 5))
    assert [memory.domain(i) for i in range(50)] == domains
    assert memory.document_span(7) == made.document_span(7)
    for wrong in (whole[1:], document, domains), (whole, document[::-1], domains), (whole, document, domains[1:]):
        with pytest.raises(ValueError, match="document ascending"):
            TokenizedCorpus.from_arrays(*wrong, 257)


def test_neither_workers_nor_shards_change_the_tokens_and_large_vocabularies_fit(tmp_path):
    one = tokenize(corpus(), tmp_path / "one", BYTES, workers=1, shard_characters=700)
    many = tokenize(iter(corpus()), tmp_path / "many", BYTES, workers=5, shard_characters=700)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    whole = tokenize(corpus(), tmp_path / "whole", BYTES)
    assert len(whole.manifest["shards"]) == 1 and whole.manifest["corpus_sha256"] == one.manifest["corpus_sha256"]
    np.testing.assert_array_equal(whole[:], many[:])
    words = tokenizers.WordEncoding([f"w{i}" for i in range(70_000)])
    wide = tokenize([Document("w0 w69999")], tmp_path / "wide", words)
    assert wide[:].tolist() == [0, 69_999, 70_000] and wide.manifest["dtype"] == "<u4" and wide.domain(0) == ""


def test_at_most_a_few_shards_are_in_memory(tmp_path):
    read = 0

    def documents():
        nonlocal read
        for document in corpus(200):
            read += 1
            yield document

    ahead = []
    tokenize(documents(), tmp_path, BYTES, 2, 1, lambda shard: ahead.append(read - len(ahead)))
    assert len(ahead) >= 190 and max(ahead) <= 5  # a document without text shares its neighbour's shard


class Killed(BaseException):
    """No code catches it, as none catches a kill."""


def test_a_kill_at_any_moment_loses_at_most_the_shard_at_hand(tmp_path, monkeypatch):
    documents, replace, n_replaced = corpus(12), os.replace, 0
    tokenize(documents, tmp_path / "whole", BYTES, 1, 300)
    whole = contents(tmp_path / "whole")

    def dying(after: bool, at: int):
        def call(*paths):
            nonlocal n_replaced
            n_replaced += 1
            if n_replaced >= at and not after:
                raise Killed
            replace(*paths)
            if n_replaced >= at:
                raise Killed

        return call

    moments = 3 * len([name for name in whole if name.endswith(".tokens")]) + 2
    for at in range(1, moments + 1):
        for after in False, True:
            folder, n_replaced = tmp_path / f"{at}{after}", 0
            monkeypatch.setattr(os, "replace", dying(after, at))
            with pytest.raises(Killed):
                tokenize(documents, folder, BYTES, 1, 300)
            monkeypatch.setattr(os, "replace", replace)
            if (at, after) != (moments, True):
                with pytest.raises((ValueError, FileNotFoundError), match=r"unfinished|no tokenised corpus"):
                    TokenizedCorpus.open(folder)
            before = {name: (folder / name).stat().st_mtime_ns for name in contents(folder) if name.endswith(".tokens")}
            tokenize(documents, folder, BYTES, 1, 300)
            kept = sum((folder / name).stat().st_mtime_ns == time for name, time in before.items())
            assert kept >= (at - 2) // 3, "finished shards are not made again"
            left = contents(folder)
            assert all(left[name] == data for name, data in whole.items())
            assert left.keys() - whole.keys() <= {"unfinished.json", *(n for n in left if n.endswith(".shard.json"))}


def test_a_killed_process_is_resumed_to_the_same_bytes(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_token_store import *
slow = lambda shard: (print(shard["n_tokens"], flush=True), time.sleep(0.02))
tokenize(corpus(400), {str(tmp_path / "killed")!r}, BYTES, 2, 500, slow)
"""
    for n_shards in 2, 9:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        for _ in range(n_shards):
            assert process.stdout.readline(), "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    with pytest.raises(ValueError, match=r"killed is unfinished: tokenize into it again"):
        TokenizedCorpus.open(tmp_path / "killed")
    tokenize(corpus(400), tmp_path / "killed", BYTES, 2, 500)
    tokenize(corpus(400), tmp_path / "whole", BYTES, 2, 500)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_what_was_finished(tmp_path, monkeypatch):
    fsync, n_written = os.fsync, 0

    def full(handle):
        nonlocal n_written
        n_written += 1
        if n_written > 16:  # two a file: itself, and its folder
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tokenize(corpus(), tmp_path / "full", BYTES, 1, 1000)
    assert not list((tmp_path / "full").glob("*.part")) and (tmp_path / "full" / "00001.shard.json").is_file()
    monkeypatch.setattr(os, "fsync", fsync)
    tokenize(corpus(), tmp_path / "full", BYTES, 1, 1000)
    tokenize(corpus(), tmp_path / "whole", BYTES, 1, 1000)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_damage_is_named_with_what_to_do(made, tmp_path):
    damaged = tmp_path / "damaged"

    def damage(name: str, change) -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(tmp_path / "made", damaged)
        file = damaged / name
        data = change(file.read_bytes())
        file.unlink() if data is None else file.write_bytes(data)

    for name in "00002.tokens", "00000.documents":
        damage(name, lambda data: data[:-2])
        with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, expected \d+; copy it again, or remove"):
            TokenizedCorpus.open(damaged)
        damage(name, lambda data: data[:-1] + b"\x07")
        with pytest.raises(ValueError, match=rf"{name} is not what was written .*copy it again, or remove"):
            TokenizedCorpus.open(damaged)
        TokenizedCorpus.open(damaged, checksums=False)
        damage(name, lambda data: None)
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing; copy it again, or remove"):
            TokenizedCorpus.open(damaged)
    damage("manifest.json", lambda data: data[:-9])
    with pytest.raises(ValueError, match=r"manifest.json is not JSON"):
        TokenizedCorpus.open(damaged)
    damage("manifest.json", lambda data: b'{"format": "other"}')
    with pytest.raises(ValueError, match=r"manifest.json is no manifest of the format"):
        TokenizedCorpus.open(damaged)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no tokenised corpus"):
        TokenizedCorpus.open(tmp_path / "nowhere")


def test_a_shard_damaged_while_unfinished_is_made_again(tmp_path):
    tokenize(corpus(), tmp_path / "whole", BYTES, 1, 1000)
    folder = tmp_path / "unfinished"
    with pytest.raises(Killed):
        tokenize(corpus(), folder, BYTES, 1, 1000, stop_after(4))
    (folder / "00000.tokens").write_bytes(b"??" + (folder / "00000.tokens").read_bytes()[2:])
    (folder / "00001.shard.json").write_text("[]")
    tokenize(corpus(), folder, BYTES, 1, 1000)
    assert contents(folder) == contents(tmp_path / "whole")


def stop_after(n: int):
    def on_shard(shard, seen=[]):  # noqa: B006  a fresh one with each call of stop_after
        seen.append(shard)
        if len(seen) == n:
            raise Killed

    return on_shard


def test_another_tokenizer_corpus_or_shard_size_is_refused(made, tmp_path):
    words = tokenizers.WordEncoding(["a"])
    with pytest.raises(ValueError, match=r"manifest.json is of the tokenizer 'bytes' \(257 .*not 'words' \(2,"):
        TokenizedCorpus.open(tmp_path / "made", words)
    with pytest.raises(ValueError, match=r"of the tokenizer 'bytes'"):
        tokenize(corpus(), tmp_path / "made", words, shard_characters=1000)
    with pytest.raises(ValueError, match=r"shard_characters=1000, not 2000"):
        tokenize(corpus(), tmp_path / "made", BYTES, shard_characters=2000)
    with pytest.raises(ValueError, match=r"made holds another corpus"):
        tokenize(corpus()[1:], tmp_path / "made", BYTES, shard_characters=1000)
    relabelled = [Document(document.text, {"domain": "other"}) for document in corpus()]
    with pytest.raises(ValueError, match=r"made holds another corpus"):
        tokenize(relabelled, tmp_path / "made", BYTES, shard_characters=1000)
    again = tokenize(corpus(), tmp_path / "made", BYTES, shard_characters=1000)
    assert again.manifest == made.manifest
    with pytest.raises(ValueError, match=r"holds no document"):
        tokenize([], tmp_path / "empty", BYTES)
    for wrong in {"workers": 0}, {"shard_characters": 0}:
        with pytest.raises(ValueError, match="at least 1"):
            tokenize(corpus(), tmp_path / "wrong", BYTES, **wrong)


def test_the_manifest_says_what_it_is_of(made):
    manifest = json.loads(json.dumps(made.manifest))
    assert manifest["tokenizer"] == {
        **{"name": "bytes", "n_vocab": 257, "eot_token": 256},
        "sha256": tokenizers.fingerprint(BYTES),
    }
    assert manifest["n_tokens"] == len(made) and manifest["n_documents"] == 50
    assert {name for shard in manifest["shards"] for name in shard["domains"]} == set("abc")


def test_facts_identify_the_tokens_in_memory_and_on_disk(made, tmp_path):
    opened, facts = made, made.facts()
    assert (facts["n_tokens"], facts["n_documents"]) == (len(opened), opened.n_documents)
    document = np.repeat(np.arange(opened.n_documents), [len(opened.document(i)) for i in range(opened.n_documents)])
    names = [opened.domain(i) for i in range(opened.n_documents)]
    held = TokenizedCorpus.from_arrays(opened[:].astype(np.int64), document, names, opened.n_vocab)
    narrow = TokenizedCorpus.from_arrays(opened[:].astype(np.uint16), document, names, opened.n_vocab)
    assert held.facts() == narrow.facts()
    changed = opened[:].astype(np.int64)
    changed[5] += 1
    assert TokenizedCorpus.from_arrays(changed, document, names, opened.n_vocab).facts() != held.facts()
    shutil.copytree(tmp_path / "made", tmp_path / "copy")
    assert TokenizedCorpus.open(tmp_path / "copy").facts() == facts


def rewritten(folder: Path, copy: Path, change) -> Path:
    """A copy of a corpus whose manifest `change` has been at."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def without_last(manifest: dict) -> None:
    last = manifest["shards"].pop()
    for name in "n_tokens", "n_documents":
        manifest[name] -= last[name]


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"].pop(), "wrong n_tokens, which is not the sum over the"),
        (without_last, r"holds more than the \d+ shards"),
        (lambda m: m.update(shards=[]), "wrong shards"),
        (lambda m: m.update(shards={"0": {}}), "wrong shards"),
        (lambda m: m.pop("shards"), "wrong shards"),
        (lambda m: m["shards"][0].update(n_tokens=-5), "wrong shards"),
        (lambda m: m["shards"][0].update(n_documents=0), "wrong shards"),
        (lambda m: m["shards"][0].update(n_tokens=True), "wrong shards"),
        (lambda m: m["shards"][0].update(domains="abc"), "wrong shards"),
        (lambda m: m["shards"][0].update(domains=[1]), "wrong shards"),
        (lambda m: m["shards"][0].pop("tokens_sha256"), "wrong shards"),
        (lambda m: m.update(n_documents=10**30), "wrong n_documents"),
        *[
            (lambda m, dtype=dtype: m.update(dtype=dtype), "wrong dtype")
            for dtype in (">u2", "<i2", "<f2", "|O", 2, None)
        ],
        (lambda m: m.update(dtype="<u4"), "bytes, expected"),
        (lambda m: m["tokenizer"].update(n_vocab=2**20), "wrong dtype"),
        (lambda m: m["tokenizer"].update(n_vocab=0), "wrong tokenizer"),
        (lambda m: m["tokenizer"].update(n_vocab="257"), "wrong tokenizer"),
        (lambda m: m["tokenizer"].update(eot_token=257), "wrong tokenizer"),
        (lambda m: m.update(tokenizer=None), "wrong tokenizer"),
        (lambda m: m.update(shard_characters=None), "wrong shard_characters"),
    ],
)
def test_a_manifest_that_was_changed_is_refused_by_name(made, tmp_path, change, message, checksums):
    folder = rewritten(tmp_path / "made", tmp_path / "changed", change)
    with pytest.raises(ValueError, match=rf"changed.*{message}"):
        TokenizedCorpus.open(folder, checksums=checksums)


def test_tokens_outside_the_vocabulary_and_tables_that_do_not_fit_are_refused(made, tmp_path):
    folder = rewritten(
        tmp_path / "made", tmp_path / "changed", lambda m: m["tokenizer"].update(n_vocab=99, eot_token=9)
    )
    with pytest.raises(ValueError, match=r"00000.tokens holds token 256 of a vocabulary of 99"):
        TokenizedCorpus.open(folder)
    with pytest.raises(ValueError, match=r"is of the tokenizer 'bytes'"):
        TokenizedCorpus.open(folder, BYTES)
    for table in [[[2**32 - 1, 0]], [[5, 7]]]:
        folder = rewritten(tmp_path / "made", tmp_path / "changed", lambda m: None)
        documents = np.fromfile(folder / "00000.documents", "<u4").reshape(-1, 2)
        documents[:1] = table
        documents.tofile(folder / "00000.documents")
        digest = hashlib.sha256(documents).hexdigest()
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0]["documents_sha256"] = digest
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"00000.documents does not fit the tokens and domains"):
            TokenizedCorpus.open(folder)


def test_of_a_changed_corpus_only_errors_that_name_the_file_come_out(made, tmp_path):
    draw = random.Random(0)
    odd = [None, 0, -1, 1.5, True, "", "<u2", [], {}, 10**30, [None], {"a": 1}, "\ud800"]
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    places = [(), ("tokenizer",), ("shards", 0)]
    for place in places:
        held = manifest
        for step in place:
            held = held[step]
        for name, value in [(name, value) for name in held for value in odd]:
            before, held[name] = held[name], value
            (tmp_path / "made" / "manifest.json").write_text(json.dumps(manifest))
            held[name] = before
            for checksums in True, False:
                try:
                    opened = TokenizedCorpus.open(tmp_path / "made", checksums=checksums)
                except (ValueError, FileNotFoundError) as error:
                    assert str(tmp_path / "made") in str(error)
                else:
                    assert len(opened) == len(made) and opened.facts() and (not checksums or opened.domain(0))
    whole = json.dumps(manifest).encode()
    for _ in range(200):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "made" / "manifest.json").write_bytes(data)
        try:
            TokenizedCorpus.open(tmp_path / "made", BYTES)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path / "made") in str(error)


@pytest.mark.parametrize(
    ("tokens_", "document"),
    [
        ([0, 5], [0, 0]),
        ([0, -1], [0, 0]),
        ([0.0, 1.0], [0, 0]),
        ([True, True], [0, 0]),
        ([0, 1], [-1, 0]),
        ([0, 1], [0.0, 0]),
        ([0, 1], [0, 10**12]),
        ([[0, 1]], [[0, 0]]),
        ([], []),
    ],
)
def test_arrays_that_hold_no_tokens_are_refused(tokens_, document):
    with pytest.raises(ValueError, match=r"must be integers, at least 0|below n_vocab = 5|must be \(n,\)"):
        TokenizedCorpus.from_arrays(np.array(tokens_), np.array(document), ["d"], 5)


@pytest.mark.parametrize("options", [{"shard_characters": n} for n in (0, 1.5, np.inf, True)] + [{"workers": np.nan}])
def test_sizes_of_shards_are_integers(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, a whole number; got"):
        tokenize(corpus(), tmp_path / "a", BYTES, **options)
    assert not (tmp_path / "a").exists()


def test_a_foreign_tokenizer_is_refused_by_name(tmp_path):
    class Foreign:
        name, n_vocab, eot_token = "sentences", 3, 2

    with pytest.raises(ValueError, match=r"'sentences'.* is no tokenizer of cratelab.corpora.tokenizers"):
        tokenize(corpus(), tmp_path / "a", Foreign())


def test_what_a_larger_corpus_left_unfinished_is_no_part_of_a_smaller(tmp_path):
    with pytest.raises(Killed):
        tokenize(corpus(), tmp_path / "a", BYTES, 1, 1000, stop_after(5))
    (tmp_path / "a" / "00000.tokens.1-0a1b2c3d.part").write_bytes(b"left by a kill")
    tokenize(corpus()[:8], tmp_path / "a", BYTES, 1, 1000)
    tokenize(corpus()[:8], tmp_path / "b", BYTES, 1, 1000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
