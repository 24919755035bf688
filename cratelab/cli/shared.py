"""What several commands do: read a corpus, choose threads, print losses."""

import math
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from cratelab.cli.options import CorpusOptions, Interpret, Layerwise, RecipeOptions
from cratelab.corpora.prepare import PreparedCorpus, prepare
from cratelab.recipe import Recipe
from cratelab.terminal import say


def new_recipe(options: RecipeOptions, preset: str, seed: int) -> Recipe:
    """The preset's recipe with what is given in its place."""
    given = {field.name: getattr(options, field.name) for field in fields(RecipeOptions)}
    return Recipe.preset(preset, seed=seed, **{name: value for name, value in given.items() if value is not None})


def prepare_corpus(options: CorpusOptions, recipe: Recipe, context: int) -> PreparedCorpus:
    """The corpus of a run; of TinyWorld, which is made each time, no more than the run will read."""
    characters = options.characters
    if options.corpus == "tinyworld":
        print("making the text of TinyWorld", file=sys.stderr)
        characters = min(characters, max(500_000, 5 * recipe.steps * recipe.batch * context))
    return prepare(options.corpus, options.tokenizer, characters, context)


def use_one_thread(width: int) -> None:
    """Small models are faster on one CPU thread: several wait for each other most of the time."""
    if width <= 128 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def print_table(table: list[dict], floor: float | None) -> None:
    say(f"{'model':8}{'preset':8}{'parameters':>12}{'seeds':>7}   validation loss, nats a token (95 % interval)")
    for row in table:
        half_width = "" if row["half_width"] is None else f" ± {defined(row['half_width'], 3)}"
        say(
            f"{row['model']:8}{row['preset']:8}{row['parameters']:12,}{row['seeds']:7}   "
            f"{defined(row['mean'], 3)}{half_width}"
        )
    if floor is not None:
        say(f"no model can do better than {floor:.3f}")


def defined(number: float | None, digits: int = 1) -> str:
    return "undefined" if number is None or not math.isfinite(number) else f"{number:.{digits}f}"


def results_file(options: Interpret | Layerwise, name: str) -> Path:
    """Where results go: where the options say, or beside the model."""
    beside = options.model if options.model.is_dir() else options.model.parent
    return options.out or beside / name


def as_facts(options: Interpret | Layerwise) -> dict:
    """The options, as JSON can say them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def report(row: dict) -> None:
    """A line for each validation where there is no progress bar."""
    if "validation_loss" in row and not sys.stderr.isatty():
        say(f"step {row['step']}: loss {row['loss']:.3f}, validation {row['validation_loss']:.3f}")
