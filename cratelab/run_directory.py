"""What a training run leaves on disk, so that a kill at any moment, a full disk or a lost loss costs little.

    run.json          model, recipe, tokenizer, corpora, provenance; from which steps it went on, by how many processes
    tokenizer.json    what made the corpora, where it is known
    metrics.jsonl     one line a step, flushed
    checkpoint-1000   a state: see `cratelab.checkpoints`
    model             the trained model
    lock              held while a process trains here

The latest two checkpoints are kept, so that there is another should a disk spoil one. What the program has not written
is left alone, whatever its name.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from cratelab.checkpoints import (
    check_sums,
    is_checkpoint,
    load_state,
    remove_checkpoint,
    whole_state,
    whole_weights,
    write_checkpoint,
)
from cratelab.corpora import tokenizers
from cratelab.corpora.token_store import TokenizedCorpus, tokenizer_facts
from cratelab.devices import exact
from cratelab.language_model import LanguageModel
from cratelab.provenance import provenance
from cratelab.recipe import Recipe
from cratelab.storage import digest_of, digest_of_file, locked, read_json, remove_leftovers, write_json, write_text

# Where each model was trained last by this process, so that an interrupted call can be made again.
_TRAINED_IN: WeakKeyDictionary[LanguageModel, Path] = WeakKeyDictionary()


def check_same_run(path: Path, facts: dict[str, dict]) -> None:
    """Refuse a folder in which a run of these facts can neither begin nor go on.

    What a kill left half-written, such as run.json.….part, is in nobody's way, and a lock neither.

    Raises:
        ValueError: the run.json in `path` states other facts, or there is none but other files.
    """
    if (path / "run.json").is_file():
        begun = read_json(path / "run.json")
        for part, ours in facts.items():
            theirs = begun.get(part)
            if part == "tokenizer" and theirs is None:
                continue  # begun without one; the corpora, compared below, are of its tokens
            if not isinstance(theirs, dict | None):
                raise ValueError(f"{path / 'run.json'} is damaged: {part} must be an object; got {theirs!r}")
            differing = [name for name in ours if (theirs or {}).get(name) != ours[name]]
            if differing:
                listed = ", ".join(f"{name} was {(theirs or {}).get(name)}, now {ours[name]}" for name in differing)
                read = part in ("tokenizer", "training", "validation")
                raise ValueError(
                    f"{path} holds a run with another {part} ({listed}): choose another folder"
                    + (", or bring back the text that it began with" if read else "")
                )
    elif path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another folder")
    elif path.is_dir() and any(entry.suffix != ".part" and entry.name != "lock" for entry in path.iterdir()):
        raise ValueError(f"{path} is not empty and holds no run: choose another folder")


class RunDirectory:
    """The folder of one run. All processes hold it; the main one writes."""

    def __init__(self, path: Path, model: LanguageModel, accelerator: Accelerator, digest: str):
        self.path, self.model, self.accelerator, self.digest = path, model, accelerator, digest

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | Path,
        model: LanguageModel,
        recipe: Recipe,
        training: TokenizedCorpus,
        validation: TokenizedCorpus,
        accelerator: Accelerator,
        command: dict | None = None,
        tokenizer: tokenizers.Tokenizer | None = None,
    ) -> Iterator[Self]:
        """Begin a run in `path`, or go on with the one that is there; nobody else can while the block lasts.

        Raises:
            ValueError: `path` holds another run, or other files.
            BlockingIOError: another process trains there.
            OSError: it cannot be written.
        """
        facts = {"model": {"model": model.kind, **asdict(model.config)}, "recipe": asdict(recipe)}
        if tokenizer:
            facts["tokenizer"] = tokenizer_facts(tokenizer)
        facts |= {"training": training.facts(), "validation": validation.facts()}
        # the hashes of the corpora are of its tokens: a caller may leave it out, and goes on all the same
        run = cls(Path(path), model, accelerator, digest_of(facts | {"tokenizer": None}))
        file, start = run.path / "run.json", _start(model)
        check_same_run(run.path, facts)
        busy = f"another process is training in {path}: wait until it has ended, or choose another folder"
        with locked(run.path / "lock", busy) if accelerator.is_main_process else nullcontext():
            check_same_run(run.path, facts)  # of one that has begun since
            # of a model that this process has trained here, the weights are no longer those it began with
            if file.is_file() and not (_TRAINED_IN.get(model) == run.path.resolve() and run.latest_step()):
                _check_start(file, start)
            _TRAINED_IN[model] = run.path.resolve()
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                with run._writing():
                    run._clean()
                    if not file.is_file():
                        about = {"command": command, "provenance": provenance(processes=accelerator.num_processes)}
                        write_json(file, facts | {"start": start} | about)
                    elif (step := run.latest_step()) < recipe.steps:
                        begun = read_json(file)
                        before = begun["went_on"] if isinstance(begun.get("went_on"), list) else []
                        now = {"step": step, "processes": accelerator.num_processes}
                        write_json(file, begun | {"went_on": [*before, now]})
                    if tokenizer and not (run.path / "tokenizer.json").is_file():
                        tokenizers.save(tokenizer, run.path / "tokenizer.json")
            accelerator.wait_for_everyone()
            yield run

    def checkpoints(self) -> dict[int, Path]:
        """The run's checkpoints by their steps, the earliest first, damaged ones included."""
        found = {}
        for entry in self.path.glob("checkpoint-*"):
            name = re.fullmatch(r"checkpoint-([1-9][0-9]*)", entry.name, re.ASCII)
            if name and is_checkpoint(entry, self.digest, int(name[1])):
                found[int(name[1])] = entry
        return dict(sorted(found.items()))

    def latest_step(self) -> int:
        """Steps that the latest checkpoint holds; 0 where there is none."""
        return max(self.checkpoints(), default=0)

    def checkpoint_path(self) -> Path:
        return self.path / f"checkpoint-{self.latest_step()}"

    def resume(self, model: nn.Module, optimizer: AcceleratedOptimizer) -> list[dict]:
        """Load the latest checkpoint, if any; the metrics of the steps up to it.

        Raises:
            ValueError: a file of the checkpoint is damaged or missing; the message says how to go on without it.
        """
        step = self.latest_step()
        if step:
            folder = self.checkpoint_path()
            try:
                sums = check_sums(folder)
            except (ValueError, OSError) as error:
                raise ValueError(f"{error}; {self._way_on(folder)}") from error
            load_state(folder, model, optimizer)
            if self.accelerator.scaler is not None and "scaler" in sums:
                self.accelerator.scaler.load_state_dict(sums["scaler"])
        self.accelerator.wait_for_everyone()
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)[:step] if step and file.is_file() else []
        if step and hashlib.sha256(b"".join(lines)).hexdigest() != sums.get("metrics"):
            raise ValueError(f"{file} does not hold steps 1 to {step} as they were written; {self._way_on(folder)}")
        if self.accelerator.is_main_process:
            with self._writing():
                write_text(file, b"".join(lines).decode())
        return [json.loads(line) for line in lines]

    def write_metrics(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            with self._writing(), (self.path / "metrics.jsonl").open("a", encoding="utf8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def save_checkpoint(self, step: int, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
        """Write the state after `step` whole, then remove those before the one before."""
        state = whole_state(model, optimizer)
        if self.accelerator.is_main_process:
            folder = self.path / f"checkpoint-{step}"
            if os.path.lexists(folder):
                warnings.warn(f"{folder} is not this run's, so step {step} is not kept", stacklevel=2)
            else:
                with self._writing():
                    with (self.path / "metrics.jsonl").open("a") as metrics:
                        os.fsync(metrics.fileno())  # no checkpoint is on the disk before the steps up to it
                    told = dict(run=self.digest, step=step, metrics=digest_of_file(self.path / "metrics.jsonl"))
                    if self.accelerator.scaler is not None:
                        told["scaler"] = self.accelerator.scaler.state_dict()
                    write_checkpoint(folder, self.model, *state, **told)
                for path in list(self.checkpoints().values())[:-2]:
                    remove_checkpoint(path)
        self.accelerator.wait_for_everyone()

    def finish(self, model: nn.Module) -> None:
        """Write the trained model."""
        weights = whole_weights(model)
        if self.accelerator.is_main_process:
            with self._writing():
                self.model.save(self.path / "model", weights)
        self.accelerator.wait_for_everyone()

    def _way_on(self, folder: Path) -> str:
        before = [path for path in self.checkpoints().values() if path != folder]
        after = f"goes on from {before[-1].name}" if before else "begins anew"
        return f"remove {folder}, then start the same run again: it {after}"

    def _clean(self) -> None:
        """Remove what killed processes have left half-written."""
        remove_leftovers(self.path, "run.json", "tokenizer.json", "metrics.jsonl", "checkpoint-[0-9]*")
        remove_leftovers(self.path / "model", "config.json", "model.safetensors")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failed write into an error that says what is safe."""
        try:
            yield
        except OSError as error:
            kept = f"the state after step {step} is safe" if (step := self.latest_step()) else "no state was kept yet"
            raise OSError(
                f"{self.path} cannot be written: {error}; {kept}. Make room, then start the same run again: it goes on"
            ) from error


@torch.no_grad()
def _start(model: LanguageModel) -> dict[str, float]:
    """For each tensor a number that tells its values from others, up to rounding, which differs between CPUs."""
    numbers = {}
    for name, tensor in model.state_dict().items():
        values = exact(tensor).cpu().flatten()
        numbers[name] = float(values @ torch.arange(len(values), dtype=values.dtype, device="cpu").cos())
    return numbers


def _check_start(file: Path, ours: dict[str, float]) -> None:
    """Raises ValueError if the run began with other weights."""
    theirs = read_json(file).get("start")
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        raise ValueError(
            f"{file} does not say with which weights the run began, as an earlier cratelab left it: its model, if it "
            "ended, can be loaded; to go on take the cratelab that began it, or choose another folder"
        )
    differing = [name for name in ours if not _close(ours[name], theirs[name])]
    if differing:
        raise ValueError(
            f"{file.parent} holds a run that began with other weights ({', '.join(differing[:3])}) than this model "
            "has now: make it anew as it was then, with the same seed and untrained, or choose another folder"
        )


def _close(a: float, b: object) -> bool:
    return isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def read_metrics(path: str | Path) -> list[dict]:
    """The metrics of a run, one dict a step, up to the first line that a kill or a loss of power has spoiled."""
    file, metrics = Path(path) / "metrics.jsonl", []
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line, parse_constant=_refuse)
            if line.endswith(b"\n") and isinstance(row, dict):
                metrics.append(row)
                continue
        break
    return metrics
