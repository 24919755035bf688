import pytest

from cratelab.corpora import documents
from cratelab.corpora.documents import Document, select, split_of


def test_a_text_has_the_split_it_always_had():
    # pinned: a change would move documents from train to test under people's feet
    texts = [f"document {i}" for i in range(200)]
    assert [i for i, text in enumerate(texts) if split_of(text) == "validation"] == [
        40,
        70,
        100,
        118,
        123,
        129,
        148,
        163,
    ]
    assert [i for i, text in enumerate(texts) if split_of(text) == "test"] == [
        44,
        59,
        81,
        105,
        108,
        117,
        120,
        150,
        162,
        165,
        185,
    ]
    assert split_of("ünï \ud800") == "train"


def test_the_splits_part_the_corpus_in_its_order_by_the_fractions():
    corpus = [Document(f"text {i}", {"domain": str(i)}) for i in range(5000)]
    fractions = 0.5, 0.3, 0.2
    parts = {split: list(select(corpus, split, fractions)) for split in documents.SPLITS}
    for split, fraction in zip(documents.SPLITS, fractions, strict=True):
        assert abs(len(parts[split]) / len(corpus) - fraction) < 0.02
        places = [int(document.meta["domain"]) for document in parts[split]]
        assert places == sorted(places)
    assert (
        sorted((d for part in parts.values() for d in part), key=lambda document: int(document.meta["domain"]))
        == corpus
    )


def test_nothing_but_the_text_decides_and_growing_test_keeps_validation():
    one, other = Document("a", {"domain": "x"}), Document("a", {"domain": "y"})
    assert all(len(list(select([one, other], split))) in (0, 2) for split in documents.SPLITS)
    for text in map(str, range(300)):
        if split_of(text, (0.8, 0.1, 0.1)) == "validation":
            assert split_of(text, (0.5, 0.1, 0.4)) == "validation"
    assert {split_of(text, (0, 0, 1)) for text in "abcdefgh"} == {"test"}
    assert {split_of(text, (1, 0, 0)) for text in "abcdefgh"} == {"train"}


@pytest.mark.parametrize("fractions", [(0.9, 0.1), (0.9, 0.2, 0.1), (1.1, -0.1, 0), (float("nan"), 0.5, 0.5)])
def test_fractions_that_are_none_are_refused_before_anything_is_read(fractions):
    with pytest.raises(ValueError, match="whose sum is 1"):
        select(iter(()), "train", fractions)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'dev'"):
        select([], "dev")
