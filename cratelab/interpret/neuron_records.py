"""Exchange with OpenAI's automated-interpretability: records as their `NeuronRecord` JSON, which their tools read.

Tested with the package on PyPI, neuron-explainer 0.0.1: it loads a record, splits its excerpts and scores a simulation.

Source: Bills et al. (2023), https://github.com/openai/automated-interpretability.
"""

import json
from pathlib import Path

import torch

from cratelab.corpora.tokens import Tokenizer
from cratelab.interpret.reading import NO_TOKEN
from cratelab.interpret.records import Excerpts, Records
from cratelab.storage import write_json


def write_neuron_record(records: Records, layer: int, neuron: int, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write one neuron's strongest and random excerpts as a `NeuronRecord`.

    Their package has no place for where in the corpus an excerpt stands, nor for density and sample of activity.
    """

    def activation_records(excerpts: Excerpts) -> list[dict]:
        found = []
        for tokens, values in zip(excerpts.tokens[layer, neuron], excerpts.activations[layer, neuron], strict=True):
            here = tokens != NO_TOKEN
            if here.any():
                words = [tokenizer.decode([token]) for token in tokens[here].tolist()]
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
        ValueError: the file is no `NeuronRecord`, or holds a token that the tokenizer does not have.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf8"))
        if content["dataclass_name"] != "NeuronRecord":
            raise KeyError("dataclass_name")
        parts = [
            [(record["tokens"], record["activations"]) for record in content[name]]
            for name in ("most_positive_activation_records", "random_sample")
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no NeuronRecord: {error!r}") from error
    width = max((len(words) for part in parts for words, _ in part), default=0)
    top, random = (_excerpts(part, width, tokenizer, path) for part in parts)
    return top, random


def _excerpts(part: list[tuple[list[str], list[float]]], width: int, tokenizer: Tokenizer, path) -> Excerpts:
    found = Excerpts(
        tokens=torch.full((1, 1, len(part), width), NO_TOKEN, dtype=torch.int32),
        activations=torch.zeros(1, 1, len(part), width),
        starts=torch.full((1, 1, len(part)), -1),
        offsets=torch.zeros(1, 1, len(part), dtype=torch.long),
    )
    for i, (words, activations) in enumerate(part):
        tokens = [tokenizer.encode_ordinary(word) for word in words]
        if wrong := [word for word, token in zip(words, tokens, strict=True) if len(token) != 1]:
            raise ValueError(f"{path} holds {wrong[0]!r}, which is not one token of {tokenizer.name}")
        if len(words) != len(activations):
            raise ValueError(f"{path} has {len(words)} tokens with {len(activations)} activations")
        found.tokens[0, 0, i, : len(words)] = torch.tensor([token[0] for token in tokens])
        found.activations[0, 0, i, : len(words)] = torch.tensor(activations)
        found.offsets[0, 0, i] = int(found.activations[0, 0, i].argmax())
    return found
