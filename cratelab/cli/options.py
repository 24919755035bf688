"""The options of every command, from which tyro makes help and errors. Nothing here takes long to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

MOST = 10**12  # of anything that is counted
RANGES = {  # of numbers, but for those that a `Recipe` checks
    "characters": (1, MOST),
    "context": (1, MOST),
    "seed": (0, 2**32 - 1),
    "seeds": (1, 1000),
    "n_tokens": (1, MOST),
    "neurons": (2, MOST),  # the control takes the explanation of another neuron of the layer
    "n_new": (0, 10**6),
    "temperature": (0, 10**6),
    "value": (-(10**15), 10**15),  # squares of what follows still fit single precision
}
Preset = Literal["toy", "1L", "2L", "3L", "S", "B"]
ScoringProtocol = Literal["top-and-random", "random-only", "anthropic"]


@dataclass(kw_only=True)
class OnDevice:
    device: str | None = None
    """Where to compute, such as cpu or cuda:1; a GPU if there is one unless given."""


@dataclass
class RecipeOptions:
    """Options of the recipe; what is not given comes from the preset."""

    steps: int | None = None
    """Updates of the weights."""
    batch: int | None = None
    """Windows a step, over all processes."""
    accumulate: int | None = None
    """Parts into which each process cuts its share of the batch, to save memory."""
    peak_rate: float | None = None
    """Learning rate after the warm-up."""
    final_rate: float | None = None
    """Learning rate at the end."""
    warmup: int | None = None
    """Steps of warm-up."""
    validate_every: int | None = None
    """Steps between validations."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    precision: Literal["auto", "no", "bf16"] | None = None
    """bf16, no (float32), or auto: bf16 where a GPU can."""
    compile: bool | None = None
    """torch.compile; where there is CUDA unless given."""


@dataclass
class CorpusOptions:
    corpus: str = "tinyworld"
    """tinyworld, pydocs, packages, wikitext, tinystories, pile, or a path to text (./pile if so named).
    Several are joined by +, which an existing path may hold, too."""
    tokenizer: str | None = None
    """gpt2, bytes, bpe-N for one trained on the corpus, or a file such as a run's tokenizer.json.
    The corpus's usual one unless given."""
    characters: int = 200_000_000
    """Training text to use at most."""
    context: int | None = None
    """Tokens the model sees at once; the preset's unless given."""


@dataclass
class Train(OnDevice, CorpusOptions, RecipeOptions):
    """Train one model. A run that was stopped goes on with --resume DIR, or with the same command again.

    Example: cratelab train --preset toy --steps 200 --run-dir runs/mine
    """

    preset: Preset = "toy"
    """Size: toy for a laptop, the others as in the paper."""
    model: Literal["crate", "gpt2"] = "crate"
    """Which model."""
    seed: int = 0
    """Of weights and windows."""
    run_dir: Path | None = None
    """Where the run is kept; runs/MODEL-PRESET-CORPUS-SEED unless given."""
    resume: Path | None = None
    """Go on with the run in this folder; all other options come from it."""
    dry_run: bool = False
    """Only print parameters, memory, arithmetic and the time to expect."""

    goes_on: ClassVar = True


@dataclass
class Compare(OnDevice, CorpusOptions, RecipeOptions):
    """Train CRATE and GPT-2 on equal tokens under several seeds: a table and a plot. Start it again to go on.

    Example: cratelab compare --presets toy --seeds 3 --out runs/compare
    """

    presets: tuple[Preset, ...] = ("toy",)
    """Sizes."""
    seeds: int = 3
    """How many seeds, counted from 0."""
    out: Path = Path("runs/compare")
    """Where runs, table and plot go."""

    goes_on: ClassVar = True


@dataclass
class TrainedModel(OnDevice):
    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a model, or a checkpoint of the official training code."""
    corpus: str | None = None
    """What it reads, as for train; a run's own validation text unless given."""
    tokenizer: str | None = None
    """As for train; a run's own unless given."""

    goes_on: ClassVar = False


@dataclass
class Interpret(TrainedModel):
    """Explain and score neurons of a trained model: all by rule, or some by asking a language model too.

    With --explainer language-model every token of the validating excerpts is a question. What it costs is said before
    any is asked, answers are kept, and the same command asks none twice. Several processes share the reading.

    Example: cratelab interpret runs/mine --n-tokens 50000
    """

    n_tokens: int = 200_000
    """Tokens to read at most."""
    protocols: tuple[ScoringProtocol, ...] = ("top-and-random", "random-only", "anthropic")
    """Which excerpts explain and which validate."""
    official: bool = False
    """With the oddities of the paper's code: excerpts may overlap and cross documents."""
    explainer: tuple[Literal["token", "suffix", "concept", "language-model"], ...] = ("token", "suffix", "concept")
    """Who explains; each with a row of its own."""
    endpoint: str | None = None
    """For language-model, who is asked: a Hugging Face model's folder, a GGUF file, or a server.
    A server speaks OpenAI's API, such as http://localhost:8000/v1."""
    language_model: str | None = None
    """The server's name for the model that explains and simulates."""
    completions: bool = False
    """Ask the server at /completions, where an excerpt is one question if the server repeats prompts; else by chat."""
    neurons: int | None = None
    """How many of each layer, at least 2 since the control takes another's explanation.
    Drawn by --seed, for all explainers. Unless given all, or 10 for language-model."""
    cache: Path | None = None
    """The language model's answers; beside the scores unless given."""
    dry_run: bool = False
    """Only print how many questions there would be at most, and ask none."""
    seed: int = 0
    """Of the random excerpts, of the untrained model and of the drawn neurons."""
    out: Path | None = None
    """Where the scores go; interpret.json in the model's folder unless given."""

    goes_on: ClassVar = True


@dataclass
class Steer(TrainedModel):
    """Edit one neuron of a trained model: which tokens this raises and lowers, and a text with and without it.

    Example: cratelab steer runs/mine --layer 1 --neuron 7 --prompt the
    """

    layer: int | None = None
    """Counted from 0; the last unless given."""
    neuron: int | None = None
    """Unless given, the one that by its atom, at its maximum, raises ten tokens most."""
    by: Literal["set", "add", "scale"] = "set"
    """What is done with the value, at every position and every new token."""
    value: float | None = None
    """Unless given, twice the neuron's maximum, or 2 to scale by."""
    prompt: str | None = None
    """What to continue; the beginning of the validation text unless given."""
    n_new: int = 30
    """Tokens to add to it."""
    temperature: float = 0.8
    """Of sampling; 0 takes the most likely token."""
    n_tokens: int = 4096
    """Validation tokens over which maxima and effects are taken."""
    seed: int = 0
    """Of sampling."""


@dataclass
class Layerwise(TrainedModel):
    """Does each layer do its job? Coding rates before and after its attention, with controls, and active neurons.

    Example: cratelab layerwise ckpt.pt --corpus wikitext --tokenizer gpt2
    """

    n_tokens: int = 16_384
    """Validation tokens to read at most."""
    eps: float = 1 / 16
    """Precision of the rates, as a share of the mean length of what a layer's subspaces see."""
    seed: int = 0
    """Of the random subspaces."""
    out: Path | None = None
    """Where all rates go; layerwise.json beside the model unless given."""


@dataclass
class Export:
    """Write a trained model as a folder for Hugging Face transformers, with its tokenizer, code and model card.

    Example: cratelab export runs/mine --to my-crate
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a model, or a checkpoint of the official training code."""
    to: Path
    """Folder to make."""
    tokenizer: str | None = None
    """gpt2, or a file such as a run's tokenizer.json; the run's own unless given."""

    goes_on: ClassVar = False


@dataclass
class Reproduce(OnDevice):
    """Make again what the package carries. Start it again to go on.

    Example: cratelab reproduce toys --seeds 1 --steps 100
    """

    what: Annotated[Literal["rates", "toys", "chapter-9", "sparser", "reference"], tyro.conf.Positional]
    """rates: at which learning rate each model learns most, on TinyWorld.
    toys: the package's own, at these rates.
    chapter-9: what the neurons of CRATE and of GPT-2 mean there.
    sparser: what those of sparser networks mean.
    reference: one to three layers of width 128 on Python's documentation."""
    out: Path | None = None
    """Where runs and results go; runs/reference or runs/tinyworld unless given."""
    seeds: int | None = None
    """How many seeds, counted from 0, for sparser from 3.
    Unless given 3 for rates and reference, 5 for toys, 10 for chapter-9 and sparser."""
    text: tuple[str, ...] = ()
    """For reference: local text to read besides, files or folders."""
    steps: int | None = None
    """Fewer than there should be, only to try it out."""

    goes_on: ClassVar = True


def check_ranges(command) -> None:
    """Raises ValueError if a number is none that the option can take."""
    for option, value in vars(command).items():
        low, high = RANGES.get(option, (-MOST, MOST))
        if (option in RANGES or isinstance(value, int)) and value is not None and not low <= value <= high:
            raise ValueError(f"{dashed(option)} must be at least {low} and at most {high}; got {value}")


def dashed(option: str) -> str:
    return "--" + option.replace("_", "-")
