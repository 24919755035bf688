"""The small trained models that chapters load: CRATE and GPT-2 of width 128 with one to three layers.

They read Python's documentation, which is on every machine, through a byte-level BPE of 4,096 tokens. The weights of
the first seed travel with the package in half precision; the numbers of all seeds are in `reference_models.json`.
"""

import json
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from cratelab.comparison import MODELS, compare, summarise
from cratelab.corpora import tokens
from cratelab.corpora.prepare import prepare
from cratelab.language_model import LanguageModel, load
from cratelab.record import provenance, write_json
from cratelab.training import Recipe

PRESETS = "1L", "2L", "3L"
CONTEXT = 256
REFERENCE = files("cratelab") / "reference"


def load_reference(model: str, preset: str) -> LanguageModel:
    """A trained reference model, in float32 and evaluation mode.

    Args:
        model: "crate" or "gpt2".
        preset: "1L", "2L" or "3L".

    Raises:
        FileNotFoundError: the package carries no such model.
    """
    folder = REFERENCE / f"{model}-{preset}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the package carries no model {model}-{preset}; there are {', '.join(MODELS)}, each {', '.join(PRESETS)}"
        )
    with as_file(folder) as path:
        return load(path)


def load_reference_tokenizer() -> tokens.Tokenizer:
    """The BPE of 4,096 tokens that the reference models read."""
    with as_file(REFERENCE / "tokenizer.json") as path:
        return tokens.load(path)


def make_reference_models(
    folder: str | Path,
    seeds: int = 3,
    text: tuple[str, ...] = (),
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train all of them into `folder`, going on where a killed call stopped, and pack the first seed's weights.

    Args:
        folder: runs, and in the end `packed`: what the package carries, to be copied to cratelab/reference.
        seeds: 0 up to this many.
        text: files or folders of local text to read besides Python's documentation.
        steps: of 8 windows of 256 tokens.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The table of `cratelab.comparison.summarise`.
    """
    folder = Path(folder)
    name = "+".join(["pydocs", "packages", *text])
    corpus = prepare(name, "bpe-4096", cache=folder / "tokens")
    recipe = Recipe(
        steps=steps,
        batch=8,
        peak_rate=2e-3,
        final_rate=2e-4,
        warmup=steps // 15,
        validate_every=max(1, steps // 15),
        validation_windows=128,
        checkpoint_every=max(1, steps // 15),
    )
    runs = compare(corpus, recipe, folder / "runs", PRESETS, range(seeds), CONTEXT, on_run, on_step)
    table = summarise(runs)
    packed = folder / "packed"
    packed.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        for preset in PRESETS:
            trained = load(folder / "runs" / f"{model}-{preset}-0" / "model")
            halves = {key: tensor.half() for key, tensor in trained.state_dict().items()}
            trained.save(packed / f"{model}-{preset}", halves)
    tokens.save(corpus.tokenizer, packed / "tokenizer.json")
    first_run = json.loads((folder / "runs" / f"crate-{PRESETS[0]}-0" / "run.json").read_text())
    about = provenance(corpus=name, first_run=first_run)
    write_json(packed / "reference_models.json", {"provenance": about, "findings": runs, "table": table})
    return table
