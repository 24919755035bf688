import json

import pytest
from test_training import corpus, new_model

from cratelab.corpora.tokens import WordEncoding
from cratelab.interpret.neuron_records import read_neuron_record, write_neuron_record
from cratelab.interpret.reading import NO_TOKEN
from cratelab.interpret.records import collect_records

WORDS = WordEncoding([f"w{i}" for i in range(19)])


@pytest.fixture
def records():
    return collect_records(new_model(), corpus(n=300), window=6, n_top=4, n_random=3)


def test_written_records_have_openais_fields(records, tmp_path):
    write_neuron_record(records, 0, 7, WORDS, tmp_path / "7.json")
    held = json.loads((tmp_path / "7.json").read_text())
    assert held["neuron_id"] == {"dataclass_name": "NeuronId", "layer_index": 0, "neuron_index": 7}
    assert set(held) >= {"random_sample", "random_sample_by_quantile", "quantile_boundaries", "mean", "variance"}
    assert set(held) >= {"skewness", "kurtosis", "most_positive_activation_records"}
    first = held["most_positive_activation_records"][0]
    assert first["dataclass_name"] == "ActivationRecord" and len(first["tokens"]) == len(first["activations"])
    tokens = records.top.tokens[0, 7, 0]
    assert first["tokens"] == [f"w{token}" for token in tokens[tokens != NO_TOKEN].tolist()]


def test_they_come_back(records, tmp_path):
    write_neuron_record(records, 0, 7, WORDS, tmp_path / "7.json")
    top, random = read_neuron_record(tmp_path / "7.json", WORDS)
    for found, written in (top, records.top), (random, records.random):
        kept = (written.tokens[0, 7] != NO_TOKEN).any(1)
        width = found.tokens.shape[-1]
        assert found.tokens[0, 0].equal(written.tokens[0, 7][kept][:, :width])
        assert found.activations[0, 0].equal(written.activations[0, 7][kept][:, :width])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no NeuronRecord"),
        ("[]", "is no NeuronRecord"),
        ('{"dataclass_name": "Poem"}', "is no NeuronRecord"),
        ('{"dataclass_name": "NeuronRecord"}', "is no NeuronRecord"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_neuron_record(tmp_path / "x.json", WORDS)


def test_a_token_of_another_vocabulary_is_named(records, tmp_path):
    write_neuron_record(records, 0, 7, WORDS, tmp_path / "7.json")
    text = (tmp_path / "7.json").read_text()
    few = WordEncoding([f"w{i}" for i in range(19)] + ["two"])
    (tmp_path / "7.json").write_text(text.replace('"w1', '"two w1'))
    with pytest.raises(ValueError, match=r"'two w1\d*', which is not one token of words"):
        read_neuron_record(tmp_path / "7.json", few)
