"""What reads a file of records, explanations or answers: whatever is in it, it is read, or refused by name."""

import copy
import json
import random

import pytest
import torch
from test_training import corpus, new_model

from cratelab.corpora.tokenizers import WordEncoding
from cratelab.interpret.asking.answers import AnswerCache
from cratelab.interpret.language_models import TextExplanations
from cratelab.interpret.openai_records import read_neuron_record, write_neuron_record
from cratelab.interpret.records import Records, collect_records
from cratelab.storage import read_json, read_tensors, write_json, write_tensors

WORDS = WordEncoding([f"w{i}" for i in range(19)])
ODD = [
    None,
    True,
    -1,
    0,
    10**9,
    10**400,
    1e39,
    float("nan"),
    float("-inf"),
    "",
    "\ud800",
    "w1",
    [],
    [[]],
    {},
    {"w1": 0},
]


@pytest.fixture(scope="module")
def records():
    return collect_records(new_model(), corpus(n=300), window=6, n_top=3, n_random=2, n_active=4)


def mutated(content, draw: random.Random):
    """The same JSON with one place changed: something odd there, or it is gone, or there twice."""
    content = copy.deepcopy(content)
    place, ways = content, []
    while isinstance(place, dict | list) and place and (not ways or draw.random() < 0.8):
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        ways.append((place, key))
        place = place[key]
    holder, key = ways[-1]
    if draw.random() < 0.2:
        del holder[key]
    elif isinstance(holder, list) and draw.random() < 0.2:
        holder.append(holder[key])
    else:
        holder[key] = draw.choice(ODD)
    return content


def read_answers(path):
    with AnswerCache(path) as cache:
        cache.get("key")


JSON_FILES = {
    "NeuronRecord": (
        lambda records, path: write_neuron_record(records, 0, 1, WORDS, path),
        lambda path: read_neuron_record(path, WORDS),
        "7.json",
    ),
    "explanations": (
        lambda records, path: TextExplanations((2, 1), ["fires", None], [None, "silent"]).save(path, [(0, 1), (1, 2)]),
        TextExplanations.load,
        "explanations.json",
    ),
    "records": (
        lambda records, path: records.save(path.parent),
        lambda path: Records.load(path.parent),
        "records.json",
    ),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_any_shape_is_read_or_refused_by_name(name, records, tmp_path):
    write, read, file = JSON_FILES[name]
    path, draw, refused = tmp_path / file, random.Random(0), 0
    write(records, path)
    content = json.loads(path.read_text())
    read(path)
    for _ in range(300):
        changed = mutated(content, draw)
        path.write_text(json.dumps(changed))
        try:
            read(path)
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error), changed
    assert refused > 50


def test_bytes_of_records_and_answers_changed_anywhere_are_read_or_refused_by_name(records, tmp_path):
    records.save(tmp_path)
    with AnswerCache(tmp_path / "answers") as cache:
        cache.put("key", {"next": [[["a", -1.0]]]})
    draw = random.Random(0)
    for path, read in (
        (tmp_path / "records.safetensors", lambda path: Records.load(path.parent)),
        (tmp_path / "answers", read_answers),
    ):
        whole = path.read_bytes()
        for _ in range(100):
            changed = bytearray(whole)
            for _ in range(draw.choice([1, 3, 30])):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            path.write_bytes(changed)
            try:
                read(path)
                assert path.name == "answers" or changed == whole
            except (ValueError, OSError) as error:
                assert str(tmp_path) in str(error)


def other_dtype(dtype):
    return lambda tensor: tensor.to(dtype)


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.flatten()[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top.activations", other_dtype(torch.int32), "top.activations must be torch.float32"),
        ("top.activations", other_dtype(torch.bfloat16), "top.activations must be torch.float32"),
        ("top.activations", with_value(torch.nan), "top.activations holds nan"),
        ("maximum", with_value(torch.inf), "maximum holds inf"),
        ("mean", other_dtype(torch.bool), "mean must be torch.float64"),
        ("top.tokens", other_dtype(torch.float32), "top.tokens must be torch.int32"),
        ("top.tokens", with_value(-2), "top.tokens holds -2"),
        ("random.offsets", with_value(6), "random.offsets holds 6"),
        ("active.starts", with_value(-7), "active.starts holds -7"),
        ("active.starts", lambda tensor: tensor[:, :, :1], "must be torch.int32 of shape"),
        ("active.offsets", lambda tensor: tensor[0], "active.offsets must be"),
        ("random.tokens", lambda tensor: tensor[..., :5], "random.tokens must be"),
        ("random.tokens", lambda tensor: tensor.flatten(), "holds no complete records"),
        ("density", with_value(5), "density holds 5"),
        ("density", lambda tensor: tensor[:, :3], "density must be"),
        ("density", lambda tensor: tensor.sum(), "density must be"),
    ],
)
def test_records_of_other_types_shapes_or_values_are_refused_by_name(name, change, message, records, tmp_path):
    records.save(tmp_path)
    tensors, facts = read_tensors(tmp_path / "records.safetensors"), read_json(tmp_path / "records.json")
    write_tensors(tmp_path / "records.safetensors", tensors | {name: change(tensors[name])})
    del facts["sha256"]  # as in files of older versions
    write_json(tmp_path / "records.json", facts)
    with pytest.raises(ValueError, match=message) as raised:
        Records.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_failed_save_leaves_the_old_records(records, tmp_path, monkeypatch):
    def full_disk(path, content):
        raise OSError("no space left")

    records.save(tmp_path)
    monkeypatch.setattr("cratelab.interpret.records.write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        collect_records(new_model(seed=1), corpus(n=300), window=6).save(tmp_path)
    assert Records.load(tmp_path).top.activations.equal(records.top.activations)


def test_records_without_a_sum_are_read_and_those_of_two_savings_refused(records, tmp_path):
    records.save(tmp_path / "a")
    collect_records(new_model(seed=1), corpus(n=300), window=6, n_top=3, n_random=2, n_active=4).save(tmp_path / "b")
    (tmp_path / "a" / "records.safetensors").replace(tmp_path / "b" / "records.safetensors")
    with pytest.raises(ValueError, match=r"b.records.safetensors is not the file that records.json was written for"):
        Records.load(tmp_path / "b")
    facts = read_json(tmp_path / "b" / "records.json")
    write_json(tmp_path / "b" / "records.json", {name: facts[name] for name in ("n_tokens", "window")})
    assert Records.load(tmp_path / "b").top.activations.equal(records.top.activations)
