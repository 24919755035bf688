import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language_model_server import foretold, quiet

from cratelab import storage
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.local_endpoint import HuggingFaceEndpoint
from cratelab.interpret.asking.simulator import LanguageModelSimulator

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_a_local_model_writes(local, folder):
    state = torch.random.get_rng_state()
    sampled = Request(("cat",), 12, temperature=1.0, seed=1)
    assert local.answer(sampled)["text"] and torch.random.get_rng_state().equal(state)
    assert local.answer(sampled) == local.answer(sampled) != local.answer(replace(sampled, seed=2))
    request = Request(("hello",), 5, temperature=0.0)
    assert local.answer(request) == local.answer(request)
    local.chat = True
    assert local.tokenizer.decode(local._encode(request)[0]) == "[[hello]]"
    local.chat = False
    with pytest.raises(ValueError, match=r"the prompt is 1600 tokens, the context of .* 1500: take fewer"):
        local.answer(Request(("x" * 1600,), top=5))


def copied(folder, path):
    return Path(shutil.copytree(folder, path))


def change_weights(path):
    file = path / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_template(path):
    file = path / "chat_template.jinja"
    file.write_text(file.read_text().replace("[[", "(("))


def test_the_name_of_a_local_model_is_that_of_all_that_decides_its_answers(local, folder, tmp_path):
    assert str(folder) in local.name
    path = copied(folder, tmp_path / "copy")
    names = [HuggingFaceEndpoint(path, device="cpu").name]
    (path / "README.md").write_text("a note")
    os.utime(path / "model.safetensors")
    assert HuggingFaceEndpoint(path, device="cpu").name == names[0]
    for change in change_weights, change_template:
        change(path)
        names.append(HuggingFaceEndpoint(path, device="cpu").name)
    assert len(set(names)) == 3


def edit_config(**changed):
    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changed))

    return edit


def with_code(path):
    (path / "evil.py").write_text("raise SystemExit('it ran')")
    edit_config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")(path)


def without_a_weight(path):
    tensors = storage.read_tensors(path / "model.safetensors")
    storage.write_tensors(path / "model.safetensors", dict(list(tensors.items())[1:]), {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit_config(num_hidden_layers=10**8), "more than its weights hold: num_hidden_layers"),
        (edit_config(vocab_size=10**8), "more than its weights hold: vocab_size"),
        (edit_config(num_hidden_layers=3), "lack"),
        (edit_config(hidden_size=None), "no causal language model"),
        (edit_config(num_hidden_layers="two"), "no causal language model"),
        (without_a_weight, "lack"),
        (with_code, "no causal language model"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 99), "is no safetensors file"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    ],
)
def test_a_local_model_that_is_not_whole_is_refused_by_name(folder, tmp_path, spoil, message):
    path = copied(folder, tmp_path / "copy")
    spoil(path)
    with pytest.raises(ValueError, match=message) as raised:
        HuggingFaceEndpoint(path, device="cpu")
    assert str(path) in str(raised.value)


def test_a_local_model_whose_weights_are_not_finite_has_problems_and_no_end(folder, tmp_path):
    path = copied(folder, tmp_path / "copy")
    tensors = storage.read_tensors(path / "model.safetensors")
    spoilt = {name: tensor * torch.nan for name, tensor in tensors.items()}
    storage.write_tensors(path / "model.safetensors", spoilt, {"format": "pt"})
    endpoint = HuggingFaceEndpoint(path, device="cpu")
    assert "the model cannot write" in endpoint.answer(Request(("cat",), 5))["problem"]
    simulator = LanguageModelSimulator(endpoint, announce=quiet)
    assert not foretold(simulator, ["one"]).any()
    assert simulator.problems == {"a log-probability that is none": 5}


def test_a_gguf_file_is_the_model_it_was_packed_from(local, packed, tmp_path):
    """And nothing that lies beside it is read, though transformers would."""
    path = Path(shutil.copy(packed, tmp_path / "copy.gguf"))
    for name in "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json":
        (tmp_path / name).write_text('{"model_type": "evil", "eos_token": "sat", "tokenizer_class": "Evil"}')
    endpoint = HuggingFaceEndpoint(path, device="cpu")
    text = "hello\tunknown é\n 7"
    ids = [
        local.tokenizer.convert_tokens_to_ids(c)
        for c in local.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    ]
    assert endpoint.tokenizer(text)["input_ids"] == ids  # all bytes, no other at the beginning
    assert endpoint.tokenizer.eos_token_id == local.tokenizer.eos_token_id == 257
    ours, theirs = (dict(each.model.state_dict()) for each in (endpoint, local))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    with torch.no_grad():
        logs = local.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    (place,) = endpoint.answer(Request((text,), top=1))["next"]
    assert place == [
        [str(n), pytest.approx(float(logs[local.tokenizer.convert_tokens_to_ids(str(n))]))] for n in range(10)
    ]
    assert endpoint.answer(Request(("hello",), 5, temperature=0.0))["text"]
    (tmp_path / "config.json").unlink()
    assert HuggingFaceEndpoint(path, device="cpu").name == endpoint.name
    assert HuggingFaceEndpoint(packed, device="cpu").name != endpoint.name


def test_a_gguf_file_that_is_damaged_is_refused_by_name(packed, tmp_path):
    content, draw = packed.read_bytes(), random.Random(0)
    path = tmp_path / "damaged.gguf"
    layers = content.index(b"llama.block_count") + len(b"llama.block_count") + 4  # after the kind of value
    damaged = [
        b"",
        b"GGUF",
        content[:1000],
        content[:-40],
        content[:layers] + b"\xff\xff\xff\x7f" + content[layers + 4 :],
    ]
    damaged += [content[: draw.randrange(len(content))] for _ in range(5)]
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(ValueError, match=r"damaged\.gguf"):
            HuggingFaceEndpoint(path, device="cpu")


def test_an_empty_prompt_is_refused(local):
    with pytest.raises(ValueError, match="no token"):
        local.answer(Request(("",), top=5))


def test_only_safe_folders_are_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        HuggingFaceEndpoint(tmp_path / "missing")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in Path(folder).glob("*.json"):
        (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing is ever unpickled"):
        HuggingFaceEndpoint(pickled)
