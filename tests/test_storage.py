"""Files are what they were or what was written, whatever stops the writer; and no two writers meet."""

import json
import multiprocessing
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from cratelab import storage


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    storage.write_json(tmp_path / "table.json", {"a": 1})
    with pytest.raises(TypeError):
        storage.write_json(tmp_path / "table.json", {"a": object()})
    monkeypatch.delattr("os.replace")  # as if killed just before it
    with pytest.raises(AttributeError):
        storage.write_json(tmp_path / "table.json", {"a": 2})
    assert storage.read_json(tmp_path / "table.json") == {"a": 1} and names(tmp_path) == ["table.json"]


def test_what_is_no_finite_number_is_null(tmp_path):
    content = {"a": float("nan"), "b": [1.5, -float("inf"), (2, {"c": float("inf")})], "d": "NaN", "e": True}
    storage.write_json(tmp_path / "table.json", content)
    expected = {"a": None, "b": [1.5, None, [2, {"c": None}]], "d": "NaN", "e": True}
    assert json.loads((tmp_path / "table.json").read_text()) == expected


def test_a_folder_takes_its_place_whole(tmp_path):
    with pytest.raises(RuntimeError), storage.replacing(tmp_path / "folder") as part:
        (part / "inner").mkdir(parents=True)
        raise RuntimeError
    assert names(tmp_path) == []
    with storage.replacing(tmp_path / "folder") as part:
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "file").write_text("text")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "text" and names(tmp_path) == ["folder"]


def test_what_is_written_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    seen, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: (seen.append("sync"), sync(descriptor)))
    monkeypatch.setattr("os.replace", lambda *paths: (seen.append("replace"), replace(*paths)))
    storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    assert seen == ["sync", "replace", "sync"]


def test_what_is_written_within_a_place_is_synced_and_renamed_with_it(tmp_path, monkeypatch):
    renamed, synced, replace, sync = [], [], os.replace, storage._sync
    monkeypatch.setattr("os.replace", lambda *paths: (renamed.append(paths[1].name), replace(*paths)))
    monkeypatch.setattr(storage, "_sync", lambda path: (synced.append(path.name), sync(path)))
    with storage.replacing(tmp_path / "folder") as part:
        (part / "inner").mkdir(parents=True)
        storage.write_json(part / "inner" / "a.json", {"a": 1})
    with storage.replacing(tmp_path / "b.json") as part:
        storage.write_json(part, {"b": 1})
    assert renamed == ["folder", "b.json"] and len(synced) == 3 + 1 + 1 + 1 and synced.count("a.json") == 1
    assert storage.read_json(tmp_path / "folder" / "inner" / "a.json") == {"a": 1} and names(tmp_path / "folder") == [
        "inner"
    ]
    with pytest.raises(TypeError), storage.replacing(tmp_path / "c") as part:
        part.mkdir()
        storage.write_text(part / "half", "half")
        storage.write_json(part / "c.json", {"c": object()})
    assert names(tmp_path) == ["b.json", "folder"]


def test_two_writers_do_not_share_a_place(tmp_path):
    with storage.replacing(tmp_path / "file") as first, storage.replacing(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first" and names(tmp_path) == ["file"]


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise storage.SafetensorError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match=r"a.safetensors cannot be written: .*No space"):
        storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    assert names(tmp_path) == []


def test_only_what_was_written_beside_a_file_is_removed(tmp_path):
    left, others = ["a.json.12-0123abcd.part"], ["a.json", "a.json.part"]
    others += ["b.json.12-0123abcd.part", "a.json.12-0123abcd.part.txt", "a.json.mine.part", "axjson.12-0123abcd.part"]
    for name in [*left, *others]:
        (tmp_path / name).write_text("")
    (tmp_path / "a.json.7-89abcdef.part").mkdir()
    (tmp_path / "a.json.7-89abcdef.part" / "file").write_text("")
    storage.remove_leftovers(tmp_path, "a.json")
    storage.remove_leftovers(tmp_path / "none", "a.json")
    assert names(tmp_path) == sorted(others)
    storage.remove_leftovers(tmp_path, "c*", "[b-z].json")
    assert names(tmp_path) == sorted(set(others) - {"b.json.12-0123abcd.part"})


def test_a_result_is_made_once_and_anew_from_anything_else(tmp_path):
    file, made = tmp_path / "found.json", []

    def find(made_from):
        return storage.cached_json(
            file, made_from, lambda: made.append(made_from) or {"n": len(made), "nan": float("nan")}
        )

    one, other = {"seed": 0, "lam": 0.1}, {"lam": 0.1, "seed": 1}
    assert find(one) == find(dict(reversed(one.items()))) == {"n": 1, "nan": None}
    assert find(other) == {"n": 2, "nan": None} and find(one)["n"] == 3
    for damaged in "", "[]", '{"n": 1}', file.read_text()[:-9], file.read_text().replace('"content"', '"other"'):
        file.write_text(damaged)
        assert find(one)["n"] == len(made) and json.loads(file.read_text())["content"]["n"] == len(made)
    assert len(made) == 8


def test_tensors_their_shapes_and_what_is_told_of_them_come_back(tmp_path):
    tensors = {"x": torch.randn(3, 4), "y": torch.arange(5)}
    storage.write_tensors(tmp_path / "a.safetensors", tensors)
    assert_close(storage.read_tensors(tmp_path / "a.safetensors"), tensors, rtol=0, atol=0)
    assert storage.tensor_shapes(tmp_path / "a.safetensors") == {"x": (3, 4), "y": (5,)}
    storage.write_tensors(tmp_path / "told.safetensors", tensors, {"step": "3"})
    assert storage.read_metadata(tmp_path / "told.safetensors").items() >= {("step", "3")}
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    for read in storage.tensor_shapes, storage.read_metadata:
        with pytest.raises(ValueError, match=r"b.safetensors"):
            read(tmp_path / "b.safetensors")
        with pytest.raises(FileNotFoundError, match=r"c.safetensors"):
            read(tmp_path / "c.safetensors")


def test_json_that_is_no_object_is_named(tmp_path):
    for content in ("[1]", "{", "[" * 100_000, "\ud800"):
        (tmp_path / "table.json").write_bytes(content.encode("utf8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"table.json"):
            storage.read_json(tmp_path / "table.json")


def test_a_lone_surrogate_is_no_obstacle(tmp_path):
    storage.write_text(tmp_path / "page.html", "a\ud800b")
    assert (tmp_path / "page.html").read_text(encoding="utf8") == "a?b"


def hold(path, held, go):
    with storage.locked(path):
        held.set()
        go.wait()


def test_one_process_at_a_time(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    held, go = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path / "lock", held, go))
    other.start()
    assert held.wait(60)
    with pytest.raises(BlockingIOError, match="somebody else"), storage.locked(tmp_path / "lock", "somebody else"):
        pass
    go.set()
    other.join()
    with storage.locked(tmp_path / "lock", "somebody else"):
        pass


def test_a_torch_file_that_would_grow_in_memory_is_refused_unread(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.namelist():
            small.writestr(entry, plain.read(entry))
    assert torch.load(tmp_path / "small.pt")["a"].shape == (100_000,), "PyTorch itself would read it"
    with pytest.raises(ValueError, match=r"small\.pt cannot be read as plain tensors.*compressed"):
        storage.read_tensors(tmp_path / "small.pt")
    assert storage.read_tensors(tmp_path / "plain.pt")["a"].shape == (100_000,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_that_are_not_what_was_written_are_refused(tmp_path, dtype):
    file, tensors = tmp_path / "a.safetensors", {"x": torch.arange(600).to(dtype), "y": torch.tensor(1, dtype=dtype)}
    storage.write_tensors(file, tensors | {"none": torch.zeros(0, 3)})
    assert_close(storage.read_tensors(file)["x"], tensors["x"], rtol=0, atol=0)
    whole = file.read_bytes()
    file.write_bytes(whole[: -len(whole) // 3].ljust(len(whole), b"\0"))
    with pytest.raises(ValueError, match=r"a\.safetensors .*SHA-256"):
        storage.read_tensors(file)
    save_file(tensors, file)  # another's file has no sum
    assert storage.read_tensors(file).keys() == tensors.keys()


def test_two_names_of_the_same_numbers_are_both_written(tmp_path):
    numbers = torch.arange(6.0)
    shared = {"all": numbers, "again": numbers, "part": numbers[3:]}
    storage.write_tensors(tmp_path / "a.safetensors", shared)
    assert_close(storage.read_tensors(tmp_path / "a.safetensors"), shared)
