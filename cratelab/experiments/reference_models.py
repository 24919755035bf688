"""The small trained models that chapters load, in half precision, as part of the package.

Two toys have read TinyWorld, each at the learning rate that is best for it; all five seeds of both travel with the
package, their numbers in `toys.json`. CRATE and GPT-2 of width 128 with one to three layers have read Python's
documentation, which is on every machine, through a byte-level BPE of 4,096 tokens; of each the first seed travels,
their numbers in `reference_models.json`. They are there to be looked at and are not fit to be compared: all had one
learning rate, and none of them knows as much as a table of trigrams of the whole text.
"""

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from cratelab.corpora import tokenizers
from cratelab.corpora.ngrams import witten_bell
from cratelab.corpora.prepare import prepare
from cratelab.experiments.comparison import check_ladder, compare, loss_table
from cratelab.experiments.rates import TOY_CONTEXT, TOY_RATE, toy_recipe
from cratelab.language_model import LanguageModel
from cratelab.models import load
from cratelab.provenance import code_of, library_code, provenance
from cratelab.recipe import Recipe
from cratelab.storage import read_json, write_json

PRESETS = "1L", "2L", "3L"
CONTEXT = 256
REFERENCE = files("cratelab") / "reference"


def load_reference(model: str, preset: str, seed: int = 0) -> LanguageModel:
    """A trained reference model, in float32 and evaluation mode.

    Args:
        model: "crate" or "gpt2".
        preset: "1L", "2L" or "3L", which have read Python's documentation, or "toy", which has read TinyWorld.
        seed: of weights and windows; others than 0 for "toy" only.

    Raises:
        FileNotFoundError: the package carries no such model.
    """
    folder = REFERENCE / f"{model}-{preset}-{seed}"
    if not folder.is_dir():
        known = sorted(entry.name for entry in REFERENCE.iterdir() if entry.is_dir())
        raise FileNotFoundError(f"the package carries no model {model}-{preset}-{seed}; there are {', '.join(known)}")
    with as_file(folder) as path:
        return load(path)


def load_reference_tokenizer() -> tokenizers.Tokenizer:
    """The BPE of 4,096 tokens that the reference models read."""
    with as_file(REFERENCE / "tokenizer.json") as path:
        return tokenizers.load(path)


def make_reference_models(
    folder: str | Path,
    seeds: int = 3,
    text: tuple[str, ...] = (),
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train those that read documentation, going on where a killed call stopped, and pack what the package carries.

    Args:
        folder: runs, and in the end `packed`: what the package carries, to be copied to cratelab/reference.
        seeds: 0 up to this many.
        text: files or folders of local text to read besides Python's documentation.
        steps: of 8 windows of 256 tokens.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The table of `cratelab.experiments.comparison.loss_table`.

    Raises:
        ValueError: no seeds or steps; `folder` holds runs of other arguments or text; or a weight is too large for half
            precision.
    """
    check_ladder(PRESETS, range(seeds))
    folder = Path(folder)
    every = max(1, steps // 15)
    recipe = Recipe(
        steps=steps,
        batch=8,
        peak_rate=2e-3,
        final_rate=2e-4,
        warmup=every,
        validate_every=every,
        validation_windows=128,
        checkpoint_every=every,
    )
    documentation = prepare("+".join(["pydocs", "packages", *text]), "bpe-4096", cache=folder / "tokens")
    runs = compare(documentation, recipe, folder / "runs", PRESETS, range(seeds), CONTEXT, on_run, on_step)
    packed = folder / "packed"
    packed.mkdir(parents=True, exist_ok=True)
    for run in runs:
        run_dir = folder / "runs" / f"{run['model']}-{run['preset']}-{run['seed']}"
        run["provenance"] = read_json(run_dir / "run.json")["provenance"]
        if run["seed"] == 0:
            _pack(run_dir / "model", packed / run_dir.name)
    tokenizers.save(documentation.tokenizer, packed / "tokenizer.json")
    train, held_out = documentation.training, documentation.validation
    about = provenance(
        library=code_of([{"library": library_code()}, *(run["provenance"] for run in runs)]),
        documentation={"name": "+".join(["pydocs", "packages", *text])} | train.facts(),
        # of orders 1 to 4, from all of the training text and from as much of it as the models read
        ngrams={n: witten_bell(train[:n], held_out[:], train.n_vocab, 4) for n in (len(train), runs[0]["tokens"])},
    )
    table = loss_table(runs)
    write_json(packed / "reference_models.json", {"provenance": about, "findings": runs, "table": table})
    return table


def make_toys(
    folder: str | Path,
    seeds: int = 5,
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train the toys on TinyWorld at their own rates, and pack every seed; arguments as for `make_reference_models`.

    Args:
        folder: as for `cratelab.experiments.rates.reproduce_rates`, whose runs are read.
        seeds: 0 up to this many.
        steps: of 16 windows of 128 tokens.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The table of `cratelab.experiments.comparison.loss_table`.

    Raises:
        ValueError: no seeds or steps; `folder` holds runs of other arguments; or a weight is too large for half
            precision.
    """
    check_ladder(["toy"], range(seeds))
    recipes = {model: toy_recipe(peak_rate, steps) for model, peak_rate in TOY_RATE.items()}
    world, packed, runs = prepare("tinyworld", context=TOY_CONTEXT), Path(folder) / "packed", []
    packed.mkdir(parents=True, exist_ok=True)
    for model, recipe in recipes.items():
        under = Path(folder) / f"toys-{recipe.peak_rate:g}"
        mine = compare(world, recipe, under, ("toy",), range(seeds), TOY_CONTEXT, on_run, on_step, [model])
        for run in mine:
            run_dir = under / f"{model}-toy-{run['seed']}"
            run["provenance"] = read_json(run_dir / "run.json")["provenance"]
            _pack(run_dir / "model", packed / run_dir.name)
        runs += mine
    about = provenance(
        seeds=list(range(seeds)),
        library=code_of([{"library": library_code()}, *(run["provenance"] for run in runs)]),
        tinyworld=world.training.facts() | {"floor": world.floor},
    )
    table = loss_table(runs)
    write_json(packed / "toys.json", {"provenance": about, "findings": runs, "table": table})
    return table


def _pack(model: Path, packed: Path) -> None:
    """Save a model anew in half precision."""
    trained = load(model)
    halves = {key: tensor.half() for key, tensor in trained.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise ValueError(f"{model} has weights too large for half precision")
    trained.save(packed, halves)
