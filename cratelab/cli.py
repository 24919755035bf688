"""The command line: one dataclass a command, from which tyro makes options, help and errors."""

import os
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import torch
import tyro

from cratelab import plots
from cratelab.budget import estimate
from cratelab.comparison import check_ladder, compare, new_model, summarise
from cratelab.corpora.prepare import PreparedCorpus, prepare, vocabulary_size
from cratelab.corpora.tokenized import tokenizer_facts
from cratelab.devices import best_device
from cratelab.interpret.concepts import text_concepts, tinyworld_concepts
from cratelab.interpret.crate_against_gpt2 import reproduce_chapter_9
from cratelab.interpret.evaluation import collect_for_protocols, evaluate, untrained
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.scores import PROTOCOLS
from cratelab.language_model import LanguageModel, LanguageModelConfig, load
from cratelab.record import provenance
from cratelab.reference_models import make_reference_models
from cratelab.steering import direct_effect, full_effect, neuron_maxima, steer
from cratelab.storage import read_json, write_json
from cratelab.training import Diverged, Recipe, train

Preset = Literal["toy", "1L", "2L", "3L", "S", "B"]
_NOT_KEPT = "run_dir", "resume", "dry_run"  # of the options of a run


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
    """gpt2, bytes, or bpe-N for one trained on the corpus; the corpus's usual one unless given."""
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

    def run(self) -> None:
        command, run_dir = self, self.run_dir
        if self.resume:
            command, run_dir = _read_command(self.resume), self.resume
        recipe = command.recipe(command.preset, command.seed)
        n_vocab = vocabulary_size(command.corpus, command.tokenizer)
        model = new_model(command.model, command.preset, n_vocab, command.seed, command.context)
        if self.dry_run:
            print(estimate(type(model), model.config, recipe))
            return
        corpus = _prepare(command, recipe, model.config.context)
        _use_one_thread(model.config.width)
        name = command.corpus.replace("/", "_")
        run_dir = run_dir or Path("runs") / f"{command.model}-{command.preset}-{name}-{command.seed}"
        print(f"{command.model} {command.preset}, {model.count_parameters():,} parameters, into {run_dir}", flush=True)
        kept = {key: value for key, value in asdict(command).items() if key not in _NOT_KEPT}
        metrics = train(model, corpus.training, corpus.validation, recipe, run_dir, _report, kept, corpus.tokenizer)
        plots.save_loss_curve(metrics, run_dir / "loss.png", corpus.floor)
        floor = f"; the floor is {corpus.floor:.3f}" if corpus.floor else ""
        print(f"validation loss {metrics[-1]['validation_loss']:.3f} nats a token{floor}")
        print(f"{run_dir}/loss.png shows it; cratelab.load('{run_dir}/model') is the model")


@dataclass
class Compare(CorpusOptions, RecipeOptions):
    """Train CRATE and GPT-2 on equal tokens under several seeds: a table and a plot. Start it again to go on."""

    presets: tuple[Preset, ...] = ("toy",)
    """Sizes."""
    seeds: int = 3
    """Seeds 0, 1, … up to this many."""
    out: Path = Path("runs/compare")
    """Where runs, table and plot go."""

    def run(self) -> None:
        check_ladder(self.presets, range(self.seeds))
        recipe = self.recipe(self.presets[0], seed=0)
        for preset in self.presets:  # what is out of range is said before the corpus is made
            new_model("crate", preset, vocabulary_size(self.corpus, self.tokenizer), 0, self.context)
        context = _preset_context(self.presets[0]) if self.context is None else self.context
        _use_one_thread(max(LanguageModelConfig.preset(preset).width for preset in self.presets))
        corpus = _prepare(self, recipe, context)
        runs = compare(
            corpus, recipe, self.out, self.presets, range(self.seeds), self.context, lambda name: print(name), _report
        )
        table = summarise(runs)
        write_json(self.out / "compare.json", {"provenance": provenance(), "runs": runs, "table": table})
        plots.save_comparison(runs, self.out / "compare.png", corpus.floor)
        print_table(table, corpus.floor)
        print(f"{self.out}/compare.png and compare.json hold it")


@dataclass
class TrainedModel:
    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a model."""
    corpus: str | None = None
    """What it reads, as for train; a run's own validation text unless given."""
    tokenizer: str | None = None
    """As for train; a run's own unless given."""

    def load(self) -> tuple[LanguageModel, PreparedCorpus]:
        run = read_json(self.model / "run.json") if (self.model / "run.json").is_file() else {}
        folder = self.model / "model" if run or (self.model / "model").is_dir() else self.model
        if run and not folder.is_dir():
            raise FileNotFoundError(_why_no_model(self.model, run))
        if self.corpus is None and folder == self.model:
            raise ValueError(f"{self.model} is no run, so nothing says what it has read: give --corpus")
        model = load(folder).to(best_device())
        _use_one_thread(model.config.width)
        command = _read_command(self.model) if self.corpus is None or run.get("command") else Train()
        theirs = _kept_tokenizer(folder.parent)
        if self.corpus:
            command.corpus = self.corpus
            inherited = self.corpus != "tinyworld" and theirs.get("name") in ("bytes", "gpt2")
            command.tokenizer = theirs["name"] if inherited else None
        command.tokenizer = self.tokenizer or command.tokenizer
        corpus = _prepare(command, command.recipe(command.preset, command.seed), model.config.context)
        _check_tokenizer(folder, theirs, model, corpus)
        if self.corpus is None and not theirs and run["validation"] != corpus.validation.facts():
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

    def run(self) -> None:
        model, corpus = self.load()
        text, world = corpus.validation, corpus.world
        concepts = tinyworld_concepts(world) if world else text_concepts(text, corpus.tokenizer)
        explainers = {"token": TokenExplainer(), "suffix": SuffixExplainer(), "concept": ConceptExplainer(concepts)}
        rows = []
        print(f"{'':10}{'protocol':16}{'explainer':11}{'mean':>6}{'95 % interval':>16}{'control':>9}{'undefined':>11}")
        for name, each in ("trained", model), ("untrained", untrained(model, self.seed)):
            strict = not self.official
            records = collect_for_protocols(each, text, self.protocols, strict, self.n_tokens, self.seed)
            for evaluation in evaluate(records, explainers, strict):
                row = {"model": name} | evaluation.row()
                rows.append(row)
                interval = f"{row['interval'][0]:.1f} to {row['interval'][1]:.1f}"
                print(
                    f"{name:10}{row['protocol']:16}{row['explainer']:11}{row['mean']:6.1f}{interval:>16}"
                    f"{row['control']:9.1f}{row['undefined']:10.0%}",
                    flush=True,
                )
        out = self.out or self.model / "interpret.json"
        write_json(out, {"provenance": provenance(corpus=text.facts(), options=_plain(asdict(self))), "rows": rows})
        print(f"{out} has them layer by layer")


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

    def run(self) -> None:
        model, corpus = self.load()
        text, tokenizer, device = corpus.validation, corpus.tokenizer, best_device()
        prompt = text[:12].tolist() if self.prompt is None else tokenizer.encode_ordinary(self.prompt)
        if not prompt:
            raise ValueError("--prompt has no token: leave it out to begin as the validation text does")
        layer = len(model.blocks) - 1 if self.layer is None else self.layer
        if not 0 <= layer < len(model.blocks):
            raise ValueError(f"--layer must be 0 to {len(model.blocks) - 1}; got {layer}")
        maxima = neuron_maxima(model, text, self.n_tokens)[layer]
        neuron = self.neuron
        if neuron is None:
            raised = direct_effect(model, layer, torch.arange(len(maxima)))[:, : text.n_vocab].topk(10).values
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
        done = {"set": "set to", "add": "plus", "scale": "times"}[self.by]
        print(f"layer {layer}, neuron {neuron}, at most {maximum:.2f} in {self.n_tokens} tokens, {done} {value:.2f}\n")
        print(
            "".join(
                f"{head:28}"
                for head in ("raised by its atom", "raised in full", "lowered by its atom", "lowered in full")
            )
        )
        columns = [effect.topk(10, largest=largest) for largest in (True, False) for effect in (direct, full)]
        for rank in range(10):
            cells = [f"{tokenizer.decode([int(c.indices[rank])])!r} {c.values[rank]:+.2f}" for c in columns]
            print("".join(f"{cell:28}" for cell in cells).rstrip())
        print("by its atom: logits for a unit of it, before the last norm's division; in full: mean change of log p\n")
        for name, edits in ("without", {}), ("with", edit):
            with steer(model, **edits):
                tokens = model.generate(
                    torch.tensor([prompt], device=device), self.n_new, temperature=self.temperature, seed=self.seed
                )
            print(f"{name}: {tokenizer.decode(tokens[0].tolist())}")


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
    """Seeds 0, 1, … up to this many; of the models on documentation the weights of seed 0 are packed."""
    text: tuple[str, ...] = ()
    """For reference: local text to read besides, files or folders."""
    steps: int | None = None
    """Fewer than there should be, only to try it out."""

    def run(self) -> None:
        _use_one_thread(128)
        on_run = partial(print, flush=True)
        if self.what == "reference":
            folder = self.out or self.reference
            print_table(
                make_reference_models(
                    folder, self.seeds, self.text, 1500 if self.steps is None else self.steps, on_run, _report
                ),
                None,
            )
            print(f"{folder}/packed is what cratelab/reference holds")
        else:
            steps = (2000, 1500) if self.steps is None else (self.steps, self.steps)
            folder = self.out or Path("runs/chapter-9")
            table = reproduce_chapter_9(folder, self.reference, self.seeds, steps, on_run, _report)
            print(f"{table} is what cratelab/reference holds")


def print_table(table: list[dict], floor: float | None) -> None:
    print(f"{'model':8}{'preset':8}{'parameters':>12}{'seeds':>7}   validation loss, nats a token (95 % interval)")
    for row in table:
        half_width = "" if row["half_width"] is None else f" ± {row['half_width']:.3f}"
        print(
            f"{row['model']:8}{row['preset']:8}{row['parameters']:12,}{row['seeds']:7}   {row['mean']:.3f}{half_width}"
        )
    if floor is not None:
        print(f"no model can do better than {floor:.3f}")


def main(arguments: list[str] | None = None) -> None:
    """`cratelab train | compare | interpret | steer | reproduce`."""
    commands = {"train": Train, "compare": Compare, "interpret": Interpret, "steer": Steer, "reproduce": Reproduce}
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="cratelab",
        description="Train CRATE, compare it with GPT-2, ask what its neurons mean, and steer them.",
        args=arguments,
    )
    try:
        command.run()
    except (ValueError, OSError, Diverged, ImportError) as error:
        sys.exit(f"cratelab: {error}")
    except KeyboardInterrupt:
        sys.exit("cratelab: stopped; the same command goes on from the last checkpoint")


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


def _plain(options: dict) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _read_command(folder: Path) -> Train:
    """The options with which a run was begun."""
    file = folder / "run.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no run.json in it")
    command = read_json(file).get("command")
    if not command:
        raise ValueError(f"{folder} was not begun by `cratelab train`: call cratelab.training.train again instead")
    hints = {name: hint for name, hint in get_type_hints(Train).items() if name not in _NOT_KEPT}
    if not isinstance(command, dict) or not command.keys() <= hints.keys():
        raise ValueError(f"{file} is damaged: command may hold {', '.join(hints)}; got {command!r}")
    for name, value in command.items():
        if not any(value == fit if isinstance(fit, str) else type(value) is fit for fit in _fitting(hints[name])):
            raise ValueError(f"{file} is damaged: {name} of its command is {value!r}")
    return Train(**command)


def _fitting(hint: type) -> list:
    """The types, and of a Literal the values, that an option may have."""
    parts = [part for each in get_args(hint) or [hint] for part in (get_args(each) or [each])]
    return [*parts, int] if float in parts else parts


def _why_no_model(folder: Path, run: dict) -> str:
    if "recipe" in run and "sae" not in run:
        how = f"cratelab train --resume {folder}" if run.get("command") else "the call of `train` that began it"
        return f"{folder} holds a run that has not ended, and no model yet: go on with {how}"
    return f"{folder} holds a run of another kind, and no language model: give the folder of `cratelab train`"


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
            "as after a change of its text: bring back the text that it has read, or tokenize another with "
            f"{folder.parent / 'tokenizer.json'} and give that folder as --corpus"
        )
    if corpus.validation.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"the corpus has {corpus.validation.n_vocab} tokens, the model in {folder} {model.config.vocab_size}: "
            "give a corpus of the tokenizer that it was trained with"
        )


def _report(row: dict) -> None:
    """A line for each validation where there is no progress bar."""
    if "validation_loss" in row and not sys.stderr.isatty():
        print(f"step {row['step']}: loss {row['loss']:.3f}, validation {row['validation_loss']:.3f}", flush=True)
