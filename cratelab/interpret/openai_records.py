"""Exchange with OpenAI's automated-interpretability: records as their `NeuronRecord` JSON, which their tools read.

Tested with the package on PyPI, neuron-explainer 0.0.1: it loads a record, splits its excerpts and scores a simulation.

Source: Bills et al. (2023), https://github.com/openai/automated-interpretability.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.records import Records
from cratelab.reading import NO_TOKEN, token_text
from cratelab.storage import read_json, write_json

PADDING = 16  # cells a token: excerpts of one neuron are about as long as one another


def write_neuron_record(records: Records, layer: int, neuron: int, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write one neuron's strongest and random excerpts as a `NeuronRecord`.

    Layer and neuron are those of the records, and so is the file's `neuron_id`: where `Records.neurons` chose some,
    they are numbered from 0.

    Their package has no place for where in the corpus an excerpt stands, nor for density and sample of activity; nor
    for the tokens' numbers: a field that it does not know ends its reading. So every byte that is no UTF-8 is written
    as a lone surrogate, U+DC80 to U+DCFF, as Python's "surrogateescape" has it, from which the token can be told.

    Raises:
        OSError: `path` cannot be written.
        ValueError: there is no such neuron, or the tokenizer lacks a token of the records.
    """
    n_layers, h = records.maximum.shape
    if not (0 <= layer < n_layers and 0 <= neuron < h):
        raise ValueError(f"there are {n_layers} layers of {h} neurons; got layer {layer}, neuron {neuron}")

    def activation_records(excerpts: Excerpts) -> list[dict]:
        found = []
        for tokens, values in zip(excerpts.tokens[layer, neuron], excerpts.activations[layer, neuron], strict=True):
            here = tokens != NO_TOKEN
            if here.any():
                words = [_exact_text(tokenizer, token) for token in tokens[here].tolist()]
                found.append(
                    {"dataclass_name": "ActivationRecord", "tokens": words, "activations": values[here].tolist()}
                )
        return found

    content = {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {"dataclass_name": "NeuronId", "layer_index": layer, "neuron_index": neuron},
        "random_sample": activation_records(records.random),
        "random_sample_by_quantile": None,
        "quantile_boundaries": None,
        "mean": float(records.mean[layer, neuron]),
        "variance": float(records.variance[layer, neuron]),
        "skewness": None,
        "kurtosis": None,
        "most_positive_activation_records": activation_records(records.top),
    }
    write_json(path, content)


def read_neuron_record(path: str | Path, tokenizer: Tokenizer) -> tuple[Excerpts, Excerpts]:
    """The strongest and the random excerpts of a `NeuronRecord`, as those of one layer of one neuron.

    Args:
        path: a file of this module, or of OpenAI's.
        tokenizer: has to know every token in it as one of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no `NeuronRecord`, holds a token that the tokenizer does not have or an activation that
            is no number, or its excerpts are of lengths too different to be held in one array.
    """
    try:
        content = read_json(path)
        if content["dataclass_name"] != "NeuronRecord":
            raise KeyError("dataclass_name")
        parts = [
            [
                (_list_of(str, record["tokens"]), _list_of((int, float), record["activations"]))
                for record in _list_of(dict, held)
            ]
            for held in (content["most_positive_activation_records"], content["random_sample"])
        ]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no NeuronRecord: {error!r}") from error
    width = max((len(words) for part in parts for words, _ in part), default=0)
    n_words = sum(len(words) for part in parts for words, _ in part)
    if width * max(map(len, parts)) > max(2**20, PADDING * n_words):
        raise ValueError(f"{path} holds {n_words} tokens, and excerpts of up to {width}: too different to be one array")
    top, random = (_excerpts(part, width, tokenizer, path) for part in parts)
    return top, random


def _list_of(kind: type | tuple[type, ...], held: object) -> list:
    if not isinstance(held, list) or not all(isinstance(each, kind) and not isinstance(each, bool) for each in held):
        raise TypeError(f"a list is expected of {kind}")
    return held


def _exact_text(tokenizer: Tokenizer, token: int) -> str:
    text = token_text(tokenizer, token)
    if "\ufffd" in text and hasattr(tokenizer, "decode_single_token_bytes"):
        return tokenizer.decode_single_token_bytes(token).decode("utf8", "surrogateescape")
    return text


def _token(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token of this text and no other, or those that the text is cut into."""
    try:
        if hasattr(tokenizer, "encode_single_token"):  # `encode_ordinary` cuts special tokens, and where it never joins
            return [tokenizer.encode_single_token(text.encode("utf8", "surrogateescape"))]
        return tokenizer.encode_ordinary(text)
    except (LookupError, ValueError):  # UnicodeEncodeError is one
        return []


def _excerpts(
    part: Sequence[tuple[list[str], list[float]]], width: int, tokenizer: Tokenizer, path: str | Path
) -> Excerpts:
    found = Excerpts(
        tokens=torch.full((1, 1, len(part), width), NO_TOKEN, dtype=torch.int32),
        activations=torch.zeros(1, 1, len(part), width),
        starts=torch.full((1, 1, len(part)), -1),
        offsets=torch.zeros(1, 1, len(part), dtype=torch.long),
    )
    for i, (words, activations) in enumerate(part):
        tokens = [_token(tokenizer, word) for word in words]
        if wrong := [word for word, token in zip(words, tokens, strict=True) if len(token) != 1]:
            raise ValueError(f"{path} holds {wrong[0]!r}, which is not one token of {tokenizer.name}")
        if not words or len(words) != len(activations):
            raise ValueError(f"{path} has {len(words)} tokens with {len(activations)} activations")
        try:
            values = torch.tensor(activations, dtype=torch.float32)
        except (OverflowError, RuntimeError):
            values = torch.tensor([torch.inf])
        if not values.isfinite().all():
            raise ValueError(f"{path} holds activations that are NaN, infinite, or too large for single precision")
        found.tokens[0, 0, i, : len(words)] = torch.tensor([token[0] for token in tokens])
        found.activations[0, 0, i, : len(words)] = values
        found.offsets[0, 0, i] = int(values.argmax())
    return found
