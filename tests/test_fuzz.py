"""Every loader against hundreds of changed files: it reads them, or a ValueError or OSError names the file.

Seeded, so that a failure comes back. JSON is changed value by value, safetensors in their header and their bytes,
checkpoints of torch entry by entry, all other files in their bytes.
"""

import io
import json
import math
import random
import shutil
import signal
import struct
from contextlib import contextmanager

import pytest
import torch
from test_crate import ARGS, official_weights
from test_robustness import FORMATS
from test_training import corpus, new_model, recipe

import cratelab as cl
from cratelab.interpret.asking.answers import AnswerCache
from cratelab.training import train

N_CHANGES = 300  # of each format
ODD = [None, True, 0, -1, 1, 3, 2.5, 1e308, -1e308, math.nan, math.inf, 10**8, 2**31, 2**63, 10**30]
ODD += ["", "x", "0", "\ud800", [], {}, [None], [[1, 2], [3]], {"": None}, ["a", 1], [0] * 50, {"a": {"b": []}}]


def official(folder):
    torch.save({"model": official_weights(ARGS), "model_args": ARGS}, folder / "checkpoint.pt")


def hugging_face(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def in_parts(folder):
    transformers = pytest.importorskip("transformers")
    cl.to_huggingface(
        cl.Crate(cl.CrateConfig(n_layers=1, n_heads=2, width=8, vocab_size=50, context=6)), folder / "one"
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "one", trust_remote_code=True)
    shutil.rmtree(folder / "one")
    loaded.save_pretrained(folder, max_shard_size="1KB")
    for source in folder.glob("*.py"):
        source.unlink()


def unfinished_run(folder):
    def stop(row):
        if row["step"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(new_model(), corpus(), corpus(), recipe(steps=4), folder / "run", stop)


def go_on(folder):
    train(new_model(), corpus(), corpus(), recipe(steps=4), folder / "run")


def answers(folder):
    with AnswerCache(folder / "answers.sqlite") as cache:
        cache.put("question", {"text": "answer"})


def ask_again(folder):
    with AnswerCache(folder / "answers.sqlite") as cache:
        cache.get("question")


LOADERS = FORMATS | {
    "official checkpoint": (official, lambda folder: cl.Crate.from_official(folder / "checkpoint.pt")),
    "Hugging Face folder": (hugging_face, cl.Gpt2.from_huggingface),
    "weights in several files": (in_parts, cl.load),
    "run": (unfinished_run, go_on),
    "answers": (answers, ask_again),
}


def odd_tensor(draw: random.Random) -> torch.Tensor:
    kinds = torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64
    odd = [torch.ones(3, 4).to(kind) for kind in kinds]
    odd += [torch.tensor(1.0), torch.empty(0), torch.full((2, 2), math.nan), torch.eye(3).to_sparse()]
    return draw.choice([*odd, torch.zeros(1).expand(10**9)])


def change_value(content: object, draw: random.Random) -> object:
    """The same with one value somewhere replaced, removed, doubled or added."""
    if not isinstance(content, dict | list) or not content or draw.random() < 0.1:
        return odd_tensor(draw) if isinstance(content, torch.Tensor) else draw.choice(ODD)
    changed = content.copy()
    key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
    what = draw.random()
    if what < 0.15:
        del changed[key]
    elif what < 0.25 and isinstance(changed, dict):
        changed[f"{key}_"] = draw.choice(ODD)
    elif what < 0.25:
        changed.insert(key, changed[key])
    else:
        changed[key] = change_value(content[key], draw)
    return changed


def change_bytes(whole: bytes, draw: random.Random) -> bytes:
    place, what = draw.randrange(len(whole)), draw.random()
    if what < 0.2:
        return whole[:place]
    if what < 0.4:
        return whole[:place] + bytes(len(whole) - place)
    if what < 0.6:
        return whole[:place] + draw.randbytes(draw.randint(1, 9)) + whole[place:]
    return whole[:place] + draw.randbytes(1) + whole[place + 1 :]


def change(name: str, whole: bytes, draw: random.Random) -> bytes:
    if name.endswith(".json"):
        return json.dumps(change_value(json.loads(whole), draw)).encode()
    if name.endswith(".safetensors") and draw.random() < 0.6:
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.dumps(change_value(json.loads(whole[8 : 8 + length]), draw)).encode()
        return struct.pack("<Q", len(header)) + header + whole[8 + length :]
    if name.endswith(".pt") and draw.random() < 0.8:
        torch.save(change_value(torch.load(io.BytesIO(whole), weights_only=True), draw), content := io.BytesIO())
        return content.getvalue()
    return change_bytes(whole, draw)


@contextmanager
def at_most(seconds: int):
    def late(*_):
        raise TimeoutError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADERS)
def test_a_changed_file_is_read_or_named(name, tmp_path):
    write, read = LOADERS[name]
    write(tmp_path)
    draw, wrong = random.Random(0), []
    good = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    files = sorted(file for file in good if good[file])
    for _ in range(N_CHANGES if name != "run" else 60):
        file = draw.choice(files)
        file.write_bytes(change(file.name, good[file], draw))
        try:
            with at_most(20):
                read(tmp_path)
        except TimeoutError as error:
            wrong.append(f"{file.name}: {error}")
        except (ValueError, OSError) as error:
            if str(tmp_path) not in str(error):
                wrong.append(f"{file.name} is not named: {error!r}")
        except BaseException as error:  # a panic of a Rust library is no Exception
            wrong.append(f"{file.name}: {error!r}")
        for path in tmp_path.rglob("*"):
            if path.is_file() and path not in good:
                path.unlink()
        for path, content in good.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong)
