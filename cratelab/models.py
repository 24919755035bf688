"""CRATE and GPT-2 by name: with fresh weights, or those that a folder holds."""

from dataclasses import fields
from pathlib import Path

import torch

from cratelab.arguments import check_seed
from cratelab.crate import Crate
from cratelab.gpt2 import Gpt2
from cratelab.language_model import LanguageModel, LanguageModelConfig
from cratelab.storage import read_json, read_tensors
from cratelab.weights import renamed

MODELS: dict[str, type[LanguageModel]] = {"crate": Crate, "gpt2": Gpt2}


def new_model(
    model: str, preset: str, n_vocab: int, seed: int, context: int | None = None, **settings
) -> LanguageModel:
    """A model with fresh weights, its vocabulary padded to a multiple of 64 as GPT-2's is.

    Args:
        model: "crate" or "gpt2".
        preset: a size, as for `CrateConfig.preset`.
        n_vocab: tokens of what it will read.
        seed: of the weights, below 2³².
        context: the preset's unless given.
        settings: of the configuration, instead of the preset's.

    Raises:
        TypeError: the configuration has no such setting.
        ValueError: there is no such model or preset, a number is out of range, or memory does not hold it.
    """
    check_seed(seed)
    if model not in MODELS:
        raise ValueError(f"no model {model!r}; there are {', '.join(MODELS)}")
    model_class = MODELS[model]
    overrides = dict(vocab_size=-(-n_vocab // 64) * 64, **settings)
    config = model_class.config_class.preset(preset, **overrides | ({} if context is None else {"context": context}))
    try:
        return _fresh(model_class, config, seed)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"memory does not hold {config}: {error}") from error


def untrained(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model of the same configuration with fresh weights: the row that every table needs beside its own.

    Raises:
        ValueError: `seed` is out of range.
    """
    check_seed(seed)
    return _fresh(type(model), model.config, seed).to(model.token_embedding.weight).eval()


def _fresh(model_class: type[LanguageModel], config: LanguageModelConfig, seed: int) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config)


def load(folder: str | Path) -> LanguageModel:
    """The model in `folder`, on the CPU, in evaluation mode and in float32 whatever the file holds.

    Args:
        folder: written by `save`, by `to_huggingface`, or by `transformers` from the latter or from its own GPT-2.

    Raises:
        FileNotFoundError: `folder` holds no config.json or model.safetensors.
        ValueError: config.json describes no known model, or the weights do not fit it, each misfit by name.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        hint = f": give {folder / 'model'}" if (folder / "model" / "config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} holds no model, since there is no config.json in it{hint}")
    config = read_json(folder / "config.json")
    if config.get("model_type") == "gpt2":
        return Gpt2.from_huggingface(folder)
    if config.get("model_type") == "crate":
        return Crate.from_huggingface(folder)
    name = config.pop("model", config.get("model_type"))
    # not those of `MODELS` alone: a reader's own model comes back too, once its class is defined
    classes = {subclass.__name__: subclass for subclass in LanguageModel.__subclasses__()}
    model_class = classes.get(str(name))
    if model_class is None:
        raise ValueError(f"{folder / 'config.json'} names the model {name!r}; known are {', '.join(sorted(classes))}")
    known = {field.name for field in fields(model_class.config_class)}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"{folder / 'config.json'} has settings that {name} does not know, perhaps of a newer cratelab: "
            f"{', '.join(unknown)}"
        )
    try:
        config = model_class.config_class(**config)
    except (TypeError, ValueError) as error:  # a field is missing, or of a wrong type or value
        raise ValueError(f"{folder / 'config.json'} does not fit {name}: {error}") from error
    weights = folder / "model.safetensors"
    return model_class.with_weights(config, renamed(read_tensors(weights), str, weights), weights)
