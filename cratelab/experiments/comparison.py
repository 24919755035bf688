"""CRATE against GPT-2 at equal tokens: several seeds, one table, intervals over seeds (chapter 7)."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean

from cratelab.arguments import check_seed
from cratelab.corpora.prepare import PreparedCorpus
from cratelab.intervals import interval
from cratelab.language_model import LanguageModelConfig
from cratelab.models import MODELS, new_model
from cratelab.recipe import Recipe
from cratelab.training import train


def check_ladder(presets: Iterable[str], seeds: Iterable[int]) -> tuple[list[str], list[int]]:
    """The sizes and seeds of a comparison as lists.

    Raises:
        ValueError: there are none, one stands twice, or there is none of that name or number.
    """
    presets = [presets] if isinstance(presets, str) else list(presets)
    if isinstance(seeds, int):
        raise ValueError(f"seeds must be several numbers, such as range({seeds}); got {seeds}")
    seeds = list(seeds)
    for name, values in ("presets", presets), ("seeds", seeds):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be one or more, each once; got {values}")
    for preset in presets:
        LanguageModelConfig.preset(preset)
    for seed in seeds:
        check_seed(seed)
    return presets, seeds


def compare(
    corpus: PreparedCorpus,
    recipe: Recipe,
    folder: str | Path,
    presets: Iterable[str] = ("toy",),
    seeds: Iterable[int] = (0, 1, 2),
    context: int | None = None,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    models: Iterable[str] = tuple(MODELS),
) -> list[dict]:
    """Train both models at each size under each seed; runs that are done are read, a killed one goes on.

    Each pair sees the same windows in the same order. The seeds are the outer loop: the first of all sizes comes first.

    Args:
        corpus: what they read.
        recipe: its `seed` is replaced.
        folder: each run gets a folder in it, such as `crate-toy-0`.
        presets: sizes.
        seeds: of weights and windows.
        context: the preset's unless given.
        on_run: called with the name of each run before it starts.
        on_step: as for `train`.
        models: both, or one of them.

    Returns:
        One dict a run, with model, preset, seed, parameters (without positions), tokens, loss (of the last step),
        validation_loss, and curve, the (tokens, validation_loss) pairs on the way.

    Raises:
        ValueError: there are no presets or seeds, or one stands twice; and as for `train`, whose other errors come too.
    """
    (presets, seeds), runs = check_ladder(presets, seeds), []
    for seed in seeds:
        for preset in presets:
            for name in models:
                if on_run:
                    on_run(f"{name}-{preset}-{seed}")
                model = new_model(name, preset, corpus.training.n_vocab, seed, context)
                run_dir = Path(folder) / f"{name}-{preset}-{seed}"
                seeded = replace(recipe, seed=seed)
                metrics = train(
                    model, corpus.training, corpus.validation, seeded, run_dir, on_step, tokenizer=corpus.tokenizer
                )
                validated = [row for row in metrics if "validation_loss" in row]
                runs.append(
                    {
                        "model": name,
                        "preset": preset,
                        "seed": seed,
                        "parameters": model.count_parameters(positions=False),
                        "tokens": metrics[-1]["tokens"],
                        "loss": metrics[-1]["loss"],
                        "validation_loss": validated[-1]["validation_loss"],
                        "curve": [(row["tokens"], row["validation_loss"]) for row in validated],
                    }
                )
    return runs


def loss_table(runs: list[dict]) -> list[dict]:
    """Mean validation loss of each model and size over its seeds, with the half-width of its 95 % interval.

    Args:
        runs: as `compare` returns them.

    Returns:
        One dict for each model and size in order, with model, preset, parameters, seeds, mean, and half_width by
        Student's t distribution, None with fewer than two seeds.
    """
    table = []
    for model, preset in dict.fromkeys((run["model"], run["preset"]) for run in runs):
        mine = [run for run in runs if (run["model"], run["preset"]) == (model, preset)]
        losses = [run["validation_loss"] for run in mine]
        row = {"model": model, "preset": preset, "parameters": mine[0]["parameters"], "seeds": len(losses)}
        table.append(row | {"mean": mean(losses), "half_width": interval(losses)})
    return table
