"""A trained model and what it has read, from the folder of a run."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

from cratelab.cli.checks import (
    check_context,
    fits,
    instead,
    model_folder,
)
from cratelab.cli.options import Interpret, Layerwise, Steer, Train, check_ranges
from cratelab.cli.shared import new_recipe, prepare_corpus, use_one_thread
from cratelab.corpora.prepare import PreparedCorpus
from cratelab.corpora.token_store import tokenizer_facts
from cratelab.crate import Crate
from cratelab.devices import best_device
from cratelab.language_model import LanguageModel
from cratelab.models import load
from cratelab.reading import check_vocabulary
from cratelab.storage import read_json


def load_run(
    options: Interpret | Steer | Layerwise, check_model: Callable[[LanguageModel], None] = lambda model: None
) -> tuple[LanguageModel, PreparedCorpus]:
    """The model, and the corpus that is asked for, or the run's own.

    Args:
        options: of the command.
        check_model: raises if the options do not fit the model; called before a corpus is read.

    Raises:
        OSError: there is no such model or run.
        ValueError: nothing says what it has read, or its tokens are not those of the corpus.
    """
    folder = model_folder(options.model)
    run = read_json(options.model / "run.json") if (options.model / "run.json").is_file() else {}
    begun = run.get("command") is not None
    if options.corpus is None and not begun:
        what = "was not begun by `cratelab train`" if run else "is no run"
        raise ValueError(f"{options.model} {what}, so nothing says what it has read: give --corpus")
    model = load_model(folder).to(best_device())
    check_model(model)
    use_one_thread(model.config.width)
    command = read_command(options.model) if begun else Train()
    theirs = {} if folder.is_file() else _kept_tokenizer(folder.parent)
    if options.corpus:
        if options.corpus == "tinyworld" and not (begun and command.corpus == "tinyworld"):
            # 5 characters a token, 20 documents for one to validate on, and half as much again
            command.characters = max(500_000, 150 * options.n_tokens)
        command.corpus = options.corpus
        kept = folder.parent / "tokenizer.json"
        inherited = options.corpus != "tinyworld" and theirs and kept.is_file()
        command.tokenizer = str(kept) if inherited else None
    command.tokenizer = options.tokenizer or command.tokenizer
    corpus = prepare_corpus(command, new_recipe(command, command.preset, command.seed), model.config.context)
    _check_tokenizer(folder, theirs, model, corpus)
    if options.corpus is None and not theirs and run.get("validation") != corpus.validation.facts():
        raise ValueError(f"the text that {options.model} has read has changed, and its tokens may have: give --corpus")
    return model, corpus


def load_model(place: Path) -> LanguageModel:
    """The model in what `model_folder` has found."""
    return Crate.from_official(place) if place.is_file() else load(place)


def remembered(command: Train) -> dict:
    """The options that a run remembers."""
    of_the_call = "run_dir", "resume", "dry_run", "device"
    return {name: value for name, value in asdict(command).items() if name not in of_the_call}


def read_command(folder: Path) -> Train:
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
    hints = {name: hint for name, hint in get_type_hints(Train).items() if name in remembered(Train())}
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
    check_vocabulary(model, corpus.validation)
