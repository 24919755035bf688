"""Models from outside, damaged many times over: refused by name, or read; never a traceback, a hang or more memory.

Each loader reads what it should, then a copy in which something was changed: a value of the configuration, a tensor, or
bytes of a file.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_crate import official_weights

import cratelab as cl

SIZES = dict(n_layers=2, n_heads=2, width=8, vocab_size=11, context=6)
OFFICIAL = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=6, bias=False, dropout=0.0)
HUGGINGFACE = dict(model_type="gpt2", n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=6, n_inner=None)


class Official:
    """A torch file with a state dict and model_args."""

    file, config = "ckpt.pt", None

    def __init__(self):
        torch.manual_seed(0)
        self.weights, self.settings = official_weights(OFFICIAL), OFFICIAL

    def write(self, folder: Path, weights: dict, settings: object) -> None:
        torch.save({"model": weights, "model_args": settings, "iter_num": 3}, folder / self.file)

    def read(self, folder: Path):
        return cl.Crate.from_official(folder / self.file)


class HuggingFace:
    """config.json and model.safetensors in a folder."""

    file, config = "model.safetensors", "config.json"

    def __init__(self):
        torch.manual_seed(0)
        d, shapes = 8, {"wte.weight": (11, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
        for i in range(2):
            for name, (rows, columns) in {
                "attn.c_attn": (d, 3 * d),
                "attn.c_proj": (d, d),
                "mlp.c_fc": (d, 4 * d),
                "mlp.c_proj": (4 * d, d),
            }.items():
                shapes |= {f"h.{i}.{name}.weight": (rows, columns), f"h.{i}.{name}.bias": (columns,)}
            for name in "ln_1", "ln_2":
                shapes |= {f"h.{i}.{name}.weight": (d,), f"h.{i}.{name}.bias": (d,)}
        self.weights = {f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}
        self.settings = HUGGINGFACE

    def write(self, folder: Path, weights: dict, settings: object) -> None:
        (folder / self.config).write_text(json.dumps(settings))
        save_file({str(name): tensor for name, tensor in weights.items()}, folder / self.file)

    def read(self, folder: Path):
        return cl.Gpt2.from_huggingface(folder)


class Own(HuggingFace):
    """What `save` writes."""

    def __init__(self, model_class=cl.Crate):
        model = model_class(model_class.config_class(**SIZES))
        self.weights = model.state_dict()
        self.settings = {"model": model.kind} | {k: v for k, v in vars(model.config).items()}

    def read(self, folder: Path):
        return cl.load(folder)


class Exported(Own):
    """What `to_huggingface` writes of a CRATE, as far as it is read."""

    def __init__(self):
        super().__init__()
        self.weights = {f"model.{name}": tensor for name, tensor in self.weights.items()}
        self.settings["model_type"] = self.settings.pop("model").lower()


KINDS = {"official": Official, "huggingface": HuggingFace, "Crate": Own, "Gpt2": lambda: Own(cl.Gpt2)}
KINDS |= {"exported": Exported}
kinds = pytest.mark.parametrize("kind", KINDS)


def read_or_named(kind, folder: Path) -> str | None:
    """What was said of the folder, or None if it was read."""
    try:
        model = kind.read(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error), error
        return str(error)
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, dtype=torch.long))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert logits.shape == (1, 1, model.config.vocab_size)
    return None


SEED = 0
MANY = 80  # changes of each kind
NUMBERS = [0, 1, -1, 3, 7, 10**8, 2**31, 2**63, 10**30, 10**400, 2.0, 2.5, -0.0, 1e-320, 1e308, math.nan, math.inf]
VALUES = [None, True, False, *NUMBERS, "2", "", "relu", "\ud800", "\x1b[2J", [], [2], {}, {"a": 1}]


def changed(draw: random.Random, settings: dict) -> object:
    """A configuration with values dropped, replaced, retyped or added."""
    if draw.random() < 0.03:
        return draw.choice(VALUES)
    settings = dict(settings)
    for _ in range(draw.randint(1, 2)):
        name = draw.choice([*settings, "colour", ""])
        if draw.random() < 0.2:
            settings.pop(name, None)
        else:
            settings[name] = draw.choice([*VALUES, str(settings.get(name)), [settings.get(name)]])
    return settings


@kinds
def test_configurations_changed_at_random(kind, tmp_path):
    kind, draw = KINDS[kind](), random.Random(SEED)
    kind.write(tmp_path, kind.weights, kind.settings)
    assert read_or_named(kind, tmp_path) is None
    said = []
    for _ in range(MANY):
        settings = changed(draw, kind.settings)
        if kind.config:
            (tmp_path / kind.config).write_text(json.dumps(settings))
        else:
            kind.write(tmp_path, kind.weights, settings)
        said.append(read_or_named(kind, tmp_path))
    assert sum(message is not None for message in said) > MANY / 2


def other(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of another shape, type or with other numbers."""
    flat = tensor.flatten()
    return draw.choice([
        lambda: tensor[:-1].contiguous(),
        lambda: tensor[:0].contiguous(),
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor[None].contiguous(),
        lambda: flat.clone(),
        lambda: flat[0].clone(),
        lambda: tensor.mT.contiguous() if tensor.ndim == 2 else tensor[None].mT.contiguous(),
        lambda: tensor.to(draw.choice([torch.float16, torch.bfloat16, torch.float64])),
        lambda: tensor.to(draw.choice([torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: torch.full_like(tensor, draw.choice([torch.nan, torch.inf, -torch.inf])),
        lambda: torch.full_like(tensor, 1e300, dtype=torch.float64),
        lambda: torch.zeros_like(tensor),
    ])()  # fmt: skip


@kinds
def test_tensors_changed_at_random(kind, tmp_path):
    kind, draw = KINDS[kind](), random.Random(SEED)
    said = []
    for _ in range(MANY):
        weights = dict(kind.weights)
        for _ in range(draw.randint(1, 2)):
            name = draw.choice([*weights])
            what = draw.randrange(5)
            if what == 0:
                weights.pop(name)
            elif what == 1:
                weights[draw.choice(["", ".", "blocks", "blocks.", "blocks.9.x", name + "x", "module." + name])] = (
                    weights.pop(name).clone()
                )
            else:
                weights[name] = other(draw, weights[name])
        kind.write(tmp_path, weights, kind.settings)
        said.append(read_or_named(kind, tmp_path))
    assert sum(message is not None for message in said) > MANY / 2


@kinds
def test_bytes_changed_at_random(kind, tmp_path):
    kind, draw = KINDS[kind](), random.Random(SEED)
    kind.write(tmp_path, kind.weights, kind.settings)
    for name in filter(None, [kind.file, kind.config]):
        whole = (tmp_path / name).read_bytes()
        for i in range(MANY):
            damaged = bytearray(whole)
            start = draw.randrange(min(len(whole), 600) if i % 2 else len(whole))  # half of them in the header
            if draw.random() < 0.2:
                del damaged[start:]
            elif draw.random() < 0.2:
                del damaged[start : start + draw.randint(1, 9)]
            else:
                for place in range(start, min(start + draw.randint(1, 4), len(whole))):
                    damaged[place] = draw.choice([0, 255, ord("9"), damaged[place] ^ (1 << draw.randrange(8))])
            (tmp_path / name).write_bytes(damaged)
            read_or_named(kind, tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert read_or_named(kind, tmp_path) is None
