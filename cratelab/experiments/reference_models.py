"""The small trained models that chapters load, in half precision, as part of the package.

CRATE and GPT-2 of width 128 with one to three layers have read Python's documentation, which is on every machine,
through a byte-level BPE of 4,096 tokens: the first seed of each travels with the package. Of the two toys that have
read TinyWorld every seed does. The numbers of all runs are in `reference_models.json`.
"""

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from cratelab.corpora import tokenizers
from cratelab.corpora.prepare import PreparedCorpus, prepare
from cratelab.experiments.comparison import check_ladder, compare, loss_table
from cratelab.language_model import LanguageModel
from cratelab.models import load
from cratelab.provenance import provenance
from cratelab.recipe import Recipe
from cratelab.storage import read_json, write_json

PRESETS = "1L", "2L", "3L"
CONTEXT, TINYWORLD_CONTEXT = 256, 128
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


def train_on_documentation(
    folder: str | Path,
    seeds: int = 3,
    text: tuple[str, ...] = (),
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    presets: tuple[str, ...] = PRESETS,
    name: str = "runs",
) -> tuple[PreparedCorpus, list[dict]]:
    """CRATE and GPT-2 on Python's documentation; arguments as for `make_reference_models`, but for two.

    Args:
        presets: sizes.
        name: of the folder in `folder` for the runs.

    Returns:
        The corpus, and the runs as `cratelab.experiments.comparison.compare` returns them.

    Raises:
        ValueError: no seeds or steps, or as for `make_reference_models`.
    """
    check_ladder(presets, range(seeds))
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
    return documentation, compare(documentation, recipe, folder / name, presets, range(seeds), CONTEXT, on_run, on_step)


def make_reference_models(
    folder: str | Path,
    seeds: int = 3,
    text: tuple[str, ...] = (),
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train all of them into `folder`, going on where a killed call stopped, and pack what the package carries.

    Args:
        folder: runs, and in the end `packed`: what the package carries, to be copied to cratelab/reference.
        seeds: 0 up to this many.
        text: files or folders of local text to read besides Python's documentation.
        steps: of 8 windows of 256 tokens; for the toys, of 16 windows of 128.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The table of `cratelab.experiments.comparison.loss_table`.

    Raises:
        ValueError: no seeds or steps; `folder` holds runs of other arguments or text; or a weight is too large for half
            precision.
    """
    folder = Path(folder)
    documentation, runs = train_on_documentation(folder, seeds, text, steps, on_run, on_step)
    world = prepare("tinyworld", context=TINYWORLD_CONTEXT)
    toy = Recipe.preset("toy", steps=steps, checkpoint_every=max(1, steps // 15))
    runs += compare(world, toy, folder / "runs", ("toy",), range(seeds), TINYWORLD_CONTEXT, on_run, on_step)
    packed = folder / "packed"
    packed.mkdir(parents=True, exist_ok=True)
    for run in runs:
        run_dir = folder / "runs" / f"{run['model']}-{run['preset']}-{run['seed']}"
        run["provenance"] = read_json(run_dir / "run.json")["provenance"]
        if run["seed"] == 0 or run["preset"] == "toy":
            _pack(run_dir / "model", packed / run_dir.name)
    tokenizers.save(documentation.tokenizer, packed / "tokenizer.json")
    about = provenance(
        documentation={"name": "+".join(["pydocs", "packages", *text])} | documentation.training.facts(),
        tinyworld=world.training.facts() | {"floor": world.floor},
    )
    table = loss_table(runs)
    write_json(packed / "reference_models.json", {"provenance": about, "findings": runs, "table": table})
    return table


def _pack(model: Path, packed: Path) -> None:
    """Save a model anew in half precision."""
    trained = load(model)
    halves = {key: tensor.half() for key, tensor in trained.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise ValueError(f"{model} has weights too large for half precision")
    trained.save(packed, halves)
