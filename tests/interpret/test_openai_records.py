import asyncio
import json

import pytest
import torch
from test_training import corpus, new_model

from cratelab.corpora.documents import Document
from cratelab.corpora.tokenizers import WordEncoding, byte_encoding, train_bpe
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import TokenExplainer
from cratelab.interpret.openai_records import read_neuron_record, write_neuron_record
from cratelab.interpret.records import Records, collect_records
from cratelab.interpret.scores import correlation
from cratelab.reading import NO_TOKEN

WORDS = WordEncoding([f"w{i}" for i in range(19)])


@pytest.fixture
def records():
    return collect_records(new_model(), corpus(n=300), window=6, n_top=4, n_random=3)


def is_list_of(kind):
    return lambda value: isinstance(value, list) and all(map(kind, value))


def is_a(kind):
    return lambda value: type(value) is kind


def has(name, **fields):
    """Exactly these fields, in this order, with the name first."""
    return lambda value: (
        value["dataclass_name"] == name
        and list(value) == ["dataclass_name", *fields]
        and all(test(value[field]) for field, test in fields.items())
    )


def is_none(value):
    return value is None


# Source: the dataclasses NeuronRecord, NeuronId and ActivationRecord in neuron_explainer/activations/activations.py of
# https://github.com/openai/automated-interpretability (0f08c3d), the same in neuron-explainer 0.0.1 on PyPI.
IS_ACTIVATION_RECORD = has("ActivationRecord", tokens=is_list_of(is_a(str)), activations=is_list_of(is_a(float)))
IS_NEURON_RECORD = has(
    "NeuronRecord",
    neuron_id=has("NeuronId", layer_index=is_a(int), neuron_index=is_a(int)),
    random_sample=is_list_of(IS_ACTIVATION_RECORD),
    random_sample_by_quantile=is_none,
    quantile_boundaries=is_none,
    mean=is_a(float),
    variance=is_a(float),
    skewness=is_none,
    kurtosis=is_none,
    most_positive_activation_records=is_list_of(IS_ACTIVATION_RECORD),
)


def test_written_records_have_openais_fields_and_no_others(records, tmp_path):
    write_neuron_record(records, 0, 7, WORDS, tmp_path / "7.json")
    held = json.loads((tmp_path / "7.json").read_text())
    assert IS_NEURON_RECORD(held)
    assert held["neuron_id"]["layer_index"] == 0 and held["neuron_id"]["neuron_index"] == 7
    assert held["mean"] == float(records.mean[0, 7]) and held["variance"] == float(records.variance[0, 7])
    assert len(held["random_sample"]) == 3 and len(held["most_positive_activation_records"]) == 4
    first = held["most_positive_activation_records"][0]
    tokens = records.top.tokens[0, 7, 0]
    assert first["tokens"] == [f"w{token}" for token in tokens[tokens != NO_TOKEN].tolist()]
    assert len(first["tokens"]) == len(first["activations"])


def test_openais_package_reads_and_scores_them(records, tmp_path, monkeypatch):
    """Explained by tokens, on their split of the excerpts; they and we find the same scores."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # they want to see one when imported
    reason = "neuron-explainer is not installed"
    activations = pytest.importorskip("neuron_explainer.activations.activations", reason=reason)
    explanations = pytest.importorskip("neuron_explainer.explanations.explanations")
    simulator = pytest.importorskip("neuron_explainer.explanations.simulator")
    scoring = pytest.importorskip("neuron_explainer.explanations.scoring")
    dataclasses = pytest.importorskip("neuron_explainer.fast_dataclasses")

    (tmp_path / "0").mkdir()
    write_neuron_record(records, 0, 7, WORDS, tmp_path / "0" / "7.json")
    record = activations.load_neuron(0, 7, tmp_path.as_uri())
    assert record.neuron_id == activations.NeuronId(layer_index=0, neuron_index=7)
    assert record.max_activation == pytest.approx(float(records.maximum[0, 7]))
    assert record.mean == float(records.mean[0, 7]) and record.variance == float(records.variance[0, 7])

    (tmp_path / "back.json").write_bytes(dataclasses.dumps(record))  # and what they write we read
    top, random = read_neuron_record(tmp_path / "back.json", WORDS)
    explained, validation = top[[0]], top[[2]].join(random[[1]])
    found = TokenExplainer().explain(explained)

    class Tokens(simulator.NeuronSimulator):
        async def simulate(self, tokens):
            shown = torch.tensor([[[[WORDS.encode_ordinary(word)[0] for word in tokens]]]], dtype=torch.int32)
            zeros = torch.zeros(1, 1, 1, dtype=torch.long)
            values = found.simulate(Excerpts(shown, torch.zeros(shown.shape), zeros, zeros))[0].flatten().tolist()
            scale = explanations.ActivationScale.SIMULATED_NORMALIZED_ACTIVATIONS
            return explanations.SequenceSimulation(list(tokens), values, scale, [], [])

    parts = activations.ActivationRecordSliceParams(n_examples_per_split=1)
    assert record.train_activation_records(parts) == record.most_positive_activation_records[:1]
    theirs = asyncio.run(scoring.simulate_and_score(Tokens(), record.valid_activation_records(parts)))
    simulated, present = found.simulate(validation)[0], validation.tokens != NO_TOKEN
    ours = correlation(*(values.flatten(2) for values in (validation.activations, simulated, present)))
    assert float(ours) == pytest.approx(theirs.ev_correlation_score, rel=1e-6)


def without_text(n_tokens):
    """Records whose excerpts hold every token once, of one neuron in one layer."""
    shown = torch.arange(n_tokens, dtype=torch.int32).reshape(1, 1, 1, -1)
    places, numbers = torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.float64)
    every = Excerpts(shown, torch.rand(shown.shape), places, places)
    return Records(every, every, every, numbers, numbers, numbers, numbers, n_tokens)


def bpe():
    text = "“naïve” 漢字 \n\n   the cat's 😀 house" * 20
    return train_bpe([Document(text, {})], 285)


@pytest.mark.parametrize("make", [byte_encoding, bpe])
def test_tokens_that_are_no_text_by_themselves_come_back(make, tmp_path):
    """Bytes that are no UTF-8, the end of text, white space that text is never cut into."""
    tokenizer = make()
    assert "\ufffd" in tokenizer.decode([0xE2]) and tokenizer.eot_token < tokenizer.n_vocab
    written = without_text(tokenizer.n_vocab)
    write_neuron_record(written, 0, 0, tokenizer, tmp_path / "0.json")
    assert IS_NEURON_RECORD(json.loads((tmp_path / "0.json").read_text()))
    top, random = read_neuron_record(tmp_path / "0.json", tokenizer)
    for found in top, random:
        assert found.tokens.equal(written.top.tokens) and found.activations.equal(written.top.activations)


def test_what_cannot_be_written_is_refused_and_nothing_is_written(records, tmp_path):
    for layer, neuron in (1, 0), (-1, 0), (0, -1), (0, records.maximum.shape[1]):
        with pytest.raises(ValueError, match=rf"got layer {layer}, neuron {neuron}"):
            write_neuron_record(records, layer, neuron, WORDS, tmp_path / "7.json")
    with pytest.raises(ValueError, match=r"there is no token \d+ in the tokenizer words"):
        write_neuron_record(records, 0, 7, WordEncoding(["w"]), tmp_path / "7.json")
    assert not list(tmp_path.iterdir())


def test_statistics_that_are_no_number_are_null(records, tmp_path):
    records.mean[0, 7] = torch.nan
    write_neuron_record(records, 0, 7, WORDS, tmp_path / "7.json")
    assert json.loads((tmp_path / "7.json").read_text())["mean"] is None
    read_neuron_record(tmp_path / "7.json", WORDS)


def record(tokens, activations):
    return {"tokens": tokens, "activations": activations}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([record(["w1"], [None])], "is no NeuronRecord"),
        ([record(["w1"], ["1"])], "is no NeuronRecord"),
        ([record(["w1"], [True])], "is no NeuronRecord"),
        ([record(["w1"], [[1.0]])], "is no NeuronRecord"),
        ([record("w1", [1.0])], "is no NeuronRecord"),
        ([record([1], [1.0])], "is no NeuronRecord"),
        ([record({"w1": 1}, [1.0])], "is no NeuronRecord"),
        ([["w1"]], "is no NeuronRecord"),
        ("w1", "is no NeuronRecord"),
        (None, "is no NeuronRecord"),
        (3, "is no NeuronRecord"),
        ({}, "is no NeuronRecord"),
        ([record(["w1"], [1.0, 2.0])], "1 tokens with 2 activations"),
        ([record([], [])], "0 tokens with 0 activations"),
        ([record(["w1"], [10**400])], "too large for single precision"),
        ([record(["w1"], [1e39])], "too large for single precision"),
        ([record(["w1"], [float("nan")])], "NaN"),
        ([record(["w1"], [float("-inf")])], "infinite"),
        ([record(["\ud800"], [1.0])], "which is not one token"),
        ([record([""], [1.0])], "which is not one token"),
    ],
)
def test_odd_records_are_refused_by_name(held, message, tmp_path):
    content = {"dataclass_name": "NeuronRecord", "most_positive_activation_records": held, "random_sample": []}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        read_neuron_record(tmp_path / "x.json", WORDS)
    assert str(tmp_path / "x.json") in str(raised.value)


def test_a_small_file_asks_for_no_large_memory(tmp_path):
    """One excerpt of 50,000 tokens and 5,000 of one: an array of 250 million."""
    held = [record(["w1"] * 50_000, [0] * 50_000)] + [record(["w1"], [1])] * 5_000
    content = {"dataclass_name": "NeuronRecord", "most_positive_activation_records": held, "random_sample": []}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="55000 tokens, and excerpts of up to 50000"):
        read_neuron_record(tmp_path / "x.json", WORDS)


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
