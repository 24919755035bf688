import gzip
import json

import pytest

from cratelab.corpora import hub

datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")


def write(file, rows):
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def folder(tmp_path):
    """A data set as it lies on the hub, which `datasets` reads alike."""
    rows = [{"text": f"Text {i}.", "meta": {"pile_set_name": "Github" if i % 2 else "FreeLaw"}} for i in range(6)]
    write(tmp_path / "train.jsonl.gz", rows)
    write(tmp_path / "test.jsonl.gz", rows[:1])
    return tmp_path


def test_documents_are_streamed_with_their_subset_as_domain(folder):
    corpus = hub.HubDocuments(str(folder))
    documents = list(corpus)
    assert [document.text for document in documents] == [f"Text {i}." for i in range(6)]
    assert documents[1].meta == {"pile_set_name": "Github", "domain": "Github"}
    assert next(iter(corpus)) == documents[0], "each iteration starts anew"
    assert len(list(hub.HubDocuments(str(folder), split="test"))) == 1


def test_nothing_is_downloaded_whole(folder, monkeypatch):
    asked = {}

    def load_dataset(*path, **options):
        asked[path] = options
        return ({"text": f"{i}", "meta": {"pile_set_name": "Github"}} for i in range(10**12))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert next(iter(hub.pile())).meta["domain"] == "Github"
    next(iter(hub.tiny_stories("validation")))
    next(iter(hub.wikitext()))
    assert asked == {
        ("monology/pile-uncopyrighted", None): {"split": "train", "streaming": True},
        ("roneneldan/TinyStories", None): {"split": "validation", "streaming": True},
        ("Salesforce/wikitext", "wikitext-103-raw-v1"): {"split": "train", "streaming": True},
    }


def test_offline_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"(?s)TinyStories.*HF_HUB_OFFLINE.*hf download.*LocalDocuments.*pydocs"):
        next(iter(hub.tiny_stories()))


def test_a_connection_lost_on_the_way_is_reported_alike(monkeypatch):
    httpx = pytest.importorskip("httpx2", reason="the hub's client is another one here")

    def rows():
        yield {"text": "a"}
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    documents = iter(hub.tiny_stories())
    assert next(documents).meta["domain"] == "TinyStories"
    with pytest.raises(ConnectionError, match=r"gone.*hf download"):
        next(documents)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        list(hub.HubDocuments(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="validation"):
        list(hub.HubDocuments(str(folder), split="validation"))
    with pytest.raises(ValueError, match=r"row 1 of .*has no text: the field 'content'"):
        list(hub.HubDocuments(str(folder), text="content"))
