"""The command line: one dataclass a command, from which tyro makes options, help and errors."""

import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_type_hints

import torch
import tyro

from cratelab import plots
from cratelab.budget import estimate
from cratelab.cli_checks import (
    MOST,
    check_context,
    check_different,
    check_folder,
    check_ranges,
    check_writable,
    dashed,
    fits,
    instead,
    model_folder,
)
from cratelab.corpora.prepare import PreparedCorpus, prepare, vocabulary_size
from cratelab.corpora.token_store import tokenizer_facts
from cratelab.corpora.tokenizers import encode
from cratelab.devices import best_device
from cratelab.experiments.chapter_9 import reproduce_chapter_9
from cratelab.experiments.comparison import check_ladder, compare, loss_table
from cratelab.experiments.reference_models import make_reference_models
from cratelab.interpret.concepts import text_concepts, tinyworld_concepts
from cratelab.interpret.evaluation import collect_for_protocols, evaluate, untrained
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.scores import PROTOCOLS
from cratelab.language_model import LanguageModel, LanguageModelConfig, load
from cratelab.models import new_model
from cratelab.provenance import provenance
from cratelab.recipe import Recipe
from cratelab.run_directory import check_same_run
from cratelab.steering import direct_effect, full_effect, neuron_maxima, steer
from cratelab.storage import read_json, write_json
from cratelab.terminal import plain_warnings, printable, say, unfailing_output
from cratelab.training import Diverged, train

Preset = Literal["toy", "1L", "2L", "3L", "S", "B"]


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

    def recipe(self, preset: str, seed: int) -> Recipe:
        given = {field.name: getattr(self, field.name) for field in fields(RecipeOptions)}
        return Recipe.preset(preset, seed=seed, **{name: value for name, value in given.items() if value is not None})


@dataclass
class CorpusOptions:
    corpus: str = "tinyworld"
    """tinyworld, pydocs, packages, wikitext, tinystories, pile, or a path to text (./pile if it has such a name);
    several are joined by +, which an existing path may hold, too."""
    tokenizer: str | None = None
    """gpt2, bytes, bpe-N for one trained on the corpus, or a file such as a run's tokenizer.json; the corpus's usual
    one unless given."""
    characters: int = 200_000_000
    """Training text to use at most."""
    context: int | None = None
    """Tokens the model sees at once; the preset's unless given."""


@dataclass
class Train(CorpusOptions, RecipeOptions):
    """Train one model. A run that was stopped goes on with --resume DIR, or with the same command again."""

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

    def check(self) -> None:
        given = [option for option, value in vars(self).items() if value != getattr(Train, option)]
        ignored = [dashed(option) for option in given if option not in ("resume", "dry_run")]
        if self.resume and ignored:
            raise ValueError(f"--resume takes all options from the run: leave out {', '.join(ignored)}")
        check_context(self.context, self.characters)
        if not self.resume and not self.dry_run:
            check_folder("--run-dir", self.run_dir or Path("runs"))
        if self.run_dir and not self.dry_run:
            check_same_run(self.run_dir, {})

    def run(self) -> None:
        command, run_dir = self, self.run_dir
        if self.resume:
            command, run_dir = _read_command(self.resume), self.resume
        recipe = command.recipe(command.preset, command.seed)
        n_vocab = vocabulary_size(command.corpus, command.tokenizer)
        model = new_model(command.model, command.preset, n_vocab, command.seed, command.context)
        if self.dry_run:
            say(str(estimate(type(model), model.config, recipe)))
            return
        name = command.corpus.replace("/", "_")
        run_dir = run_dir or Path("runs") / f"{command.model}-{command.preset}-{name}-{command.seed}"
        check_same_run(run_dir, {"model": {"model": model.kind, **asdict(model.config)}, "recipe": asdict(recipe)})
        corpus = _prepare(command, recipe, model.config.context)
        _use_one_thread(model.config.width)
        say(f"{command.model} {command.preset}, {model.count_parameters():,} parameters, into {run_dir}")
        kept = _kept(command)
        metrics = train(model, corpus.training, corpus.validation, recipe, run_dir, _report, kept, corpus.tokenizer)
        plots.save_loss_curve(metrics, run_dir / "loss.png", corpus.floor)
        floor = f"; the floor is {corpus.floor:.3f}" if corpus.floor else ""
        say(f"validation loss {_defined(metrics[-1]['validation_loss'], 3)} nats a token{floor}")
        say(f"{run_dir}/loss.png shows it; cratelab.load('{run_dir}/model') is the model")


@dataclass
class Compare(CorpusOptions, RecipeOptions):
    """Train CRATE and GPT-2 on equal tokens under several seeds: a table and a plot. Start it again to go on."""

    presets: tuple[Preset, ...] = ("toy",)
    """Sizes."""
    seeds: int = 3
    """How many seeds, counted from 0."""
    out: Path = Path("runs/compare")
    """Where runs, table and plot go."""

    goes_on: ClassVar = True

    def check(self) -> None:
        check_context(self.context, self.characters)
        check_folder("--out", self.out)

    def run(self) -> None:
        check_ladder(self.presets, range(self.seeds))
        recipe = self.recipe(self.presets[0], seed=0)
        for preset in self.presets:  # what is out of range is said before the corpus is made
            new_model("crate", preset, vocabulary_size(self.corpus, self.tokenizer), 0, self.context)
        context = _preset_context(self.presets[0]) if self.context is None else self.context
        _use_one_thread(max(LanguageModelConfig.preset(preset).width for preset in self.presets))
        corpus = _prepare(self, recipe, context)
        runs = compare(corpus, recipe, self.out, self.presets, range(self.seeds), self.context, say, _report)
        table = loss_table(runs)
        write_json(self.out / "compare.json", {"provenance": provenance(), "runs": runs, "table": table})
        plots.save_comparison(runs, self.out / "compare.png", corpus.floor)
        print_table(table, corpus.floor)
        say(f"{self.out}/compare.png and compare.json hold it")


@dataclass
class TrainedModel:
    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a model."""
    corpus: str | None = None
    """What it reads, as for train; a run's own validation text unless given."""
    tokenizer: str | None = None
    """As for train; a run's own unless given."""

    goes_on: ClassVar = False

    def check(self) -> None:
        """Raises ValueError or OSError if something is wrong with the options, before anything is read."""

    def check_model(self, model: LanguageModel) -> None:
        """Raises ValueError if the options do not fit the model, before a corpus is read."""

    def load(self) -> tuple[LanguageModel, PreparedCorpus]:
        folder = model_folder(self.model)
        run = read_json(self.model / "run.json") if (self.model / "run.json").is_file() else {}
        begun = run.get("command") is not None
        if self.corpus is None and not begun:
            what = "was not begun by `cratelab train`" if run else "is no run"
            raise ValueError(f"{self.model} {what}, so nothing says what it has read: give --corpus")
        model = load(folder).to(best_device())
        self.check_model(model)
        _use_one_thread(model.config.width)
        command = _read_command(self.model) if begun else Train()
        theirs = _kept_tokenizer(folder.parent)
        if self.corpus:
            command.corpus = self.corpus
            kept = folder.parent / "tokenizer.json"
            inherited = self.corpus != "tinyworld" and theirs and kept.is_file()
            command.tokenizer = str(kept) if inherited else None
        command.tokenizer = self.tokenizer or command.tokenizer
        corpus = _prepare(command, command.recipe(command.preset, command.seed), model.config.context)
        _check_tokenizer(folder, theirs, model, corpus)
        if self.corpus is None and not theirs and run.get("validation") != corpus.validation.facts():
            raise ValueError(f"the text that {self.model} has read has changed, and its tokens may have: give --corpus")
        return model, corpus


@dataclass
class Interpret(TrainedModel):
    """Explain and score every neuron of a trained model, by rule and without a language model."""

    n_tokens: int = 200_000
    """Tokens to read at most."""
    protocols: tuple[Literal["top-and-random", "random-only", "anthropic"], ...] = PROTOCOLS
    """Which excerpts explain and which validate."""
    official: bool = False
    """With the oddities of the paper's code: excerpts may overlap and cross documents."""
    seed: int = 0
    """Of the random excerpts and of the untrained model."""
    out: Path | None = None
    """Where the scores go; interpret.json in the model's folder unless given."""

    def check(self) -> None:
        check_different("--protocols", self.protocols)
        model_folder(self.model)
        out = self.out or self.model / "interpret.json"
        if out.is_dir():
            raise IsADirectoryError(f"--out must be a file to write; {out} is a folder")
        if self.out and out.is_file() and "rows" not in read_json(out):
            raise ValueError(f"--out: {out} is there and holds something else than scores: choose another name")
        check_writable("--out", out)

    def run(self) -> None:
        model, corpus = self.load()
        text, world = corpus.validation, corpus.world
        concepts = tinyworld_concepts(world) if world else text_concepts(text, corpus.tokenizer)
        explainers = {"token": TokenExplainer(), "suffix": SuffixExplainer(), "concept": ConceptExplainer(concepts)}
        rows = []
        say(f"{'':10}{'protocol':16}{'explainer':11}{'mean':>10}{'95 % interval':>16}{'control':>10}{'undefined':>11}")
        for name, each in ("trained", model), ("untrained", untrained(model, self.seed)):
            strict = not self.official
            records = collect_for_protocols(each, text, self.protocols, strict, self.n_tokens, self.seed)
            for evaluation in evaluate(records, explainers, strict):
                row = {"model": name} | evaluation.row()
                rows.append(row)
                mean, control, low, high = map(_defined, (row["mean"], row["control"], *row["interval"]))
                interval = "undefined" if "undefined" in (low, high) else f"{low} to {high}"
                say(
                    f"{name:10}{row['protocol']:16}{row['explainer']:11}{mean:>10}{interval:>16}"
                    f"{control:>10}{row['undefined']:11.0%}"
                )
        out = self.out or self.model / "interpret.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"provenance": provenance(corpus=text.facts(), options=_plain(asdict(self))), "rows": rows})
        say(f"{out} has them layer by layer")


@dataclass
class Steer(TrainedModel):
    """Edit one neuron of a trained model: which tokens this raises and lowers, and a text with and without it."""

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

    def check(self) -> None:
        if self.prompt is not None and not self.prompt:
            raise ValueError("--prompt has no token: leave it out to begin as the validation text does")

    def check_model(self, model: LanguageModel) -> None:
        last = len(model.blocks) - 1
        if self.layer is not None and not 0 <= self.layer <= last:
            raise ValueError(f"--layer must be 0 to {last}; got {self.layer}")
        if self.neuron is not None:
            direct_effect(model, last if self.layer is None else self.layer, torch.tensor([self.neuron]))

    def run(self) -> None:
        model, corpus = self.load()
        text, tokenizer, device = corpus.validation, corpus.tokenizer, best_device()
        if not len(text):
            raise ValueError("the corpus has no validation text to steer on: give a longer --corpus")
        prompt = text[:12].tolist() if self.prompt is None else encode(tokenizer, self.prompt).tolist()
        if not prompt:
            raise ValueError("--prompt has no token: leave it out to begin as the validation text does")
        layer = len(model.blocks) - 1 if self.layer is None else self.layer
        maxima = neuron_maxima(model, text, self.n_tokens)[layer]
        neuron, shown = self.neuron, min(10, text.n_vocab)
        if neuron is None:
            raised = direct_effect(model, layer, torch.arange(len(maxima)))[:, : text.n_vocab].topk(shown).values
            neuron = int((raised.mean(1) * maxima).argmax())
        direct = direct_effect(model, layer, torch.tensor([neuron]))[0, : text.n_vocab]
        maximum, value = float(maxima[neuron]), self.value
        if value is None:
            if not maximum > 0:
                raise ValueError(
                    f"neuron {neuron} of layer {layer} is not active in {self.n_tokens} tokens: give --value"
                )
            value = 2.0 if self.by == "scale" else 2 * maximum
        edit = dict(layer=layer, neuron=neuron, by=self.by, value=value)
        length = min(model.config.context, len(text))
        windows = torch.from_numpy(text.validation_windows(length, max(1, min(self.n_tokens, len(text)) // length)))
        full = full_effect(model, windows.to(device), layer, torch.tensor([neuron]), torch.tensor([value]), self.by)[
            0, : text.n_vocab
        ]
        if not full.isfinite().all():
            raise ValueError(f"the model gives no finite numbers with --value {value:g}: take a smaller one")
        done = {"set": "set to", "add": "plus", "scale": "times"}[self.by]
        say(f"layer {layer}, neuron {neuron}, at most {maximum:.2f} in {self.n_tokens} tokens, {done} {value:.2f}\n")
        say(
            "".join(
                f"{head:28}"
                for head in ("raised by its atom", "raised in full", "lowered by its atom", "lowered in full")
            )
        )
        columns = [effect.topk(shown, largest=largest) for largest in (True, False) for effect in (direct, full)]
        for rank in range(shown):
            cells = [f"{tokenizer.decode([int(c.indices[rank])])!r} {c.values[rank]:+.2f}" for c in columns]
            say("".join(f"{cell:28}" for cell in cells).rstrip())
        say("by its atom: logits for a unit of it, before the last norm's division; in full: mean change of log p\n")
        for name, edits in ("without", {}), ("with", edit):
            with steer(model, **edits):
                tokens = model.generate(
                    torch.tensor([prompt], device=device),
                    self.n_new,
                    temperature=self.temperature,
                    seed=self.seed,
                    n_vocab=text.n_vocab,
                )
            say(f"{name}: {tokenizer.decode(tokens[0].tolist())}")


@dataclass
class Reproduce:
    """Make again what the package carries. Start it again to go on."""

    what: Annotated[Literal["reference", "chapter-9"], tyro.conf.Positional]
    """reference: CRATE and GPT-2, one to three layers of width 128, on Python's documentation, and toys on TinyWorld.
    chapter-9: what their neurons mean, and those of models of width 64 on TinyWorld."""
    out: Path | None = None
    """Where runs and results go; runs/reference or runs/chapter-9 unless given."""
    reference: Path = Path("runs/reference")
    """For chapter-9: where the reference models are, or will be."""
    seeds: int = 3
    """How many seeds, counted from 0; of the models on documentation the weights of seed 0 are packed."""
    text: tuple[str, ...] = ()
    """For reference: local text to read besides, files or folders."""
    steps: int | None = None
    """Fewer than there should be, only to try it out."""

    goes_on: ClassVar = True

    def check(self) -> None:
        least = 1 if self.what == "reference" else 3  # some runs of chapter 9 have a third of the steps
        if self.steps is not None and not least <= self.steps <= MOST:
            raise ValueError(f"--steps must be at least {least} and at most {MOST}; got {self.steps}")
        if self.what == "chapter-9" and self.text:
            raise ValueError("--text is for reference: chapter-9 reads what the reference models have read")
        for option in ("out", "reference"):
            if folder := getattr(self, option):
                check_folder(dashed(option), folder)

    def run(self) -> None:
        _use_one_thread(128)
        if self.what == "reference":
            folder = self.out or self.reference
            print_table(make_reference_models(folder, self.seeds, self.text, self.steps or 1500, say, _report), None)
            say(f"{folder}/packed is what cratelab/reference holds")
        else:
            steps = (2000, 1500) if self.steps is None else (self.steps, self.steps)
            folder = self.out or Path("runs/chapter-9")
            table = reproduce_chapter_9(folder, self.reference, self.seeds, steps, say, _report)
            say(f"{table} is what cratelab/reference holds")


def print_table(table: list[dict], floor: float | None) -> None:
    say(f"{'model':8}{'preset':8}{'parameters':>12}{'seeds':>7}   validation loss, nats a token (95 % interval)")
    for row in table:
        half_width = "" if row["half_width"] is None else f" ± {_defined(row['half_width'], 3)}"
        say(
            f"{row['model']:8}{row['preset']:8}{row['parameters']:12,}{row['seeds']:7}   "
            f"{_defined(row['mean'], 3)}{half_width}"
        )
    if floor is not None:
        say(f"no model can do better than {floor:.3f}")


def main(arguments: list[str] | None = None) -> None:
    """`cratelab train | compare | interpret | steer | reproduce`.

    Raises:
        SystemExit: with a message, which is status 1, where a command cannot do what it is asked; status 2 where it
            was called wrongly, 130 where Ctrl-C stopped it.
    """
    with unfailing_output() as output, plain_warnings():
        _main(arguments)
    if output.error and not isinstance(output.error, BrokenPipeError):  # whoever closes a pipe has seen enough
        sys.exit(f"cratelab: all is done, but what it printed is cut off: {output.error}")


def _main(arguments: list[str] | None) -> None:
    commands = {"train": Train, "compare": Compare, "interpret": Interpret, "steer": Steer, "reproduce": Reproduce}
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="cratelab",
        description="Train CRATE, compare it with GPT-2, ask what its neurons mean, and steer them.",
        args=arguments,
    )
    try:
        check_ranges(command)
        command.check()
        command.run()
    except (ValueError, OSError, Diverged, ImportError) as error:
        sys.exit(f"cratelab: {printable(str(error))}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(
            "cratelab: there is not enough memory: take a smaller model, context or batch "
            f"({printable(str(error)) or 'MemoryError'})"
        )
    except KeyboardInterrupt:
        print(
            "cratelab: stopped" + ("; the same command goes on from the last checkpoint" if command.goes_on else ""),
            file=sys.stderr,
        )
        sys.exit(130)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was asked for that there is not; on the CPU torch says so by a plain RuntimeError."""
    told = "allocate", "out of memory", "size calculation overflowed"
    return isinstance(error, MemoryError) or any(each in str(error) for each in told)


def _defined(number: float | None, digits: int = 1) -> str:
    return "undefined" if number is None or not math.isfinite(number) else f"{number:.{digits}f}"


def _use_one_thread(width: int) -> None:
    """Small models are faster on one CPU thread: several wait for each other most of the time."""
    if width <= 128 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _prepare(options: CorpusOptions, recipe: Recipe, context: int) -> PreparedCorpus:
    """The corpus of a run; of TinyWorld, which is made each time, no more than the run will read."""
    characters = options.characters
    if options.corpus == "tinyworld":
        characters = min(characters, max(500_000, 5 * recipe.steps * recipe.batch * context))
    return prepare(options.corpus, options.tokenizer, characters, context)


def _preset_context(preset: str) -> int:
    return LanguageModelConfig.preset(preset).context


def _kept(command: Train) -> dict:
    """The options that a run remembers."""
    return {name: value for name, value in asdict(command).items() if name not in ("run_dir", "resume", "dry_run")}


def _plain(options: dict) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _read_command(folder: Path) -> Train:
    """The options with which a run was begun."""
    file = folder / "run.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no run.json in it{instead(folder)}")
    command = read_json(file).get("command")
    if command is None:
        raise ValueError(f"{folder} was not begun by `cratelab train`: call what began it again instead")
    return _as_train(command, file)


def _as_train(command: object, file: Path) -> Train:
    """The command that `file` holds.

    Raises:
        ValueError: it is none, or has options that are unknown or out of range; each is named, with `file`.
    """
    hints = {name: hint for name, hint in get_type_hints(Train).items() if name in _kept(Train())}
    if not isinstance(command, dict):
        raise ValueError(f"{file} is damaged: command may hold {', '.join(hints)}; got {command!r}")
    problems = [f"unknown option {name!r}, perhaps of a newer cratelab" for name in command if name not in hints]
    problems += [f"no {name}" for name in ("corpus", "preset", "model", "seed") if name not in command]
    problems += [
        f"{name} cannot be {command[name]!r}"
        for name, hint in hints.items()
        if name in command and not fits(command[name], hint)
    ]
    if problems:
        raise ValueError(f"{file} is damaged: {'; '.join(problems)}")
    train_command = Train(**command)
    try:
        check_ranges(train_command)
        check_context(train_command.context, train_command.characters)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return train_command


def _kept_tokenizer(folder: Path) -> dict:
    """What the run.json of a folder says of the tokenizer; nothing if it does not, or there is none."""
    file = folder / "run.json"
    facts = read_json(file).get("tokenizer", {}) if file.is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is damaged: tokenizer must be an object; got {facts!r}")
    return facts


def _check_tokenizer(folder: Path, theirs: dict, model: LanguageModel, corpus: PreparedCorpus) -> None:
    """Raises ValueError if the model was trained on tokens that stand for other texts than those of the corpus."""
    ours = tokenizer_facts(corpus.tokenizer)
    names = [f"{facts.get('name')}, {facts.get('n_vocab')}" for facts in (theirs, ours)]
    if theirs and theirs.get("sha256") != ours["sha256"]:
        raise ValueError(
            f"the model in {folder} was trained on other tokens ({names[0]} of them) than the corpus has ({names[1]}), "
            "as after a change of its text: bring back the text that it has read, or give another as --corpus, "
            f"which is read with {folder.parent / 'tokenizer.json'} unless --tokenizer names another"
        )
    if corpus.validation.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"the corpus has {corpus.validation.n_vocab} tokens, the model in {folder} {model.config.vocab_size}: "
            "give a corpus of the tokenizer that it was trained with"
        )


def _report(row: dict) -> None:
    """A line for each validation where there is no progress bar."""
    if "validation_loss" in row and not sys.stderr.isatty():
        say(f"step {row['step']}: loss {row['loss']:.3f}, validation {row['validation_loss']:.3f}")
