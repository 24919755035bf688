"""What a training run leaves on disk, so that a kill at any moment, a full disk or a lost loss costs little.

    run.json          model, recipe, corpora (sizes and hashes) and provenance, written before the first step
    metrics.jsonl     one line a step, flushed
    checkpoint-1000   the latest state: the model as `LanguageModel.save` writes it, and AdamW's moments
    model             the trained model

Checkpoints are written beside and renamed, so one that has its name is whole; the one before goes only then.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from cratelab.corpora.tokenized import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.record import provenance
from cratelab.storage import read_json, read_tensors, write_json

if TYPE_CHECKING:
    from cratelab.training import Recipe

# Whole tensors on the main process's CPU, under the model's own names, however the weights are spread over GPUs.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_same_run(path: Path, facts: dict[str, dict]) -> None:
    """Refuse a folder in which a run of these facts can neither begin nor go on.

    What a kill left half-written, such as run.json.part, is in nobody's way, and a lock neither.

    Raises:
        ValueError: the run.json in `path` states other facts, or there is none but other files.
    """
    if (path / "run.json").is_file():
        begun = read_json(path / "run.json")
        for part, ours in facts.items():
            theirs = begun.get(part) or {}
            differing = [name for name in ours if theirs.get(name) != ours[name]]
            if differing:
                listed = ", ".join(f"{name} was {theirs.get(name)}, now {ours[name]}" for name in differing)
                raise ValueError(f"{path} holds a run with another {part} ({listed}): choose another folder")
    elif path.is_dir() and any(
        entry.suffix not in (".part", ".lock") and entry.name != "lock" for entry in path.iterdir()
    ):
        raise ValueError(f"{path} is not empty and holds no run: choose another folder")


class RunDirectory:
    """The folder of one run. All processes hold it; the main one writes."""

    def __init__(self, path: Path, model: LanguageModel, accelerator: Accelerator):
        self.path, self.model, self.accelerator = path, model, accelerator

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: LanguageModel,
        recipe: "Recipe",
        training: TokenizedCorpus,
        validation: TokenizedCorpus,
        accelerator: Accelerator,
        command: dict | None = None,
    ) -> Self:
        """Begin a run in `path`, or go on with the one that is there.

        Raises:
            ValueError: `path` holds another run, or other files.
        """
        run = cls(Path(path), model, accelerator)
        facts = {
            "model": {"model": model.kind, **asdict(model.config)},
            "recipe": asdict(recipe),
            "training": training.facts(),
            "validation": validation.facts(),
        }
        file = run.path / "run.json"
        check_same_run(run.path, facts)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not file.is_file():
            with run._writing():
                run.path.mkdir(parents=True, exist_ok=True)
                about = {"command": command, "provenance": provenance(processes=accelerator.num_processes)}
                write_json(file, facts | about)
        accelerator.wait_for_everyone()
        return run

    def latest_step(self) -> int:
        """Steps that the latest checkpoint holds; 0 where there is none."""
        names = [entry.name.removeprefix("checkpoint-") for entry in self.path.glob("checkpoint-*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def checkpoint_path(self) -> Path:
        return self.path / f"checkpoint-{self.latest_step()}"

    def resume(self, model: nn.Module, optimizer: Optimizer) -> list[dict]:
        """Load the latest checkpoint, if any; the metrics of the steps up to it.

        Raises:
            ValueError: a file of the checkpoint is damaged.
        """
        step = self.latest_step()
        if step:
            folder = self.checkpoint_path()
            weights = read_tensors(folder / "model.safetensors")
            moments = read_tensors(folder / "optimizer.safetensors")
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(model, weights, options=options)
            state = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
            if _moments(state).keys() != moments.keys():
                raise ValueError(f"{folder / 'optimizer.safetensors'} is not the state of this optimizer")
            for parameter, held in state["state"].items():
                held.update({name: moments[f"{parameter}.{name}"] for name in held})
            set_optimizer_state_dict(model, optimizer.optimizer, state, options=options)
        self.accelerator.wait_for_everyone()
        metrics = read_metrics(self.path)[:step]
        if len(metrics) != step:
            raise ValueError(f"{self.path / 'metrics.jsonl'} has {len(metrics)} steps, the checkpoint {step}")
        if self.accelerator.is_main_process:
            with self._writing():
                part = self.path / "metrics.jsonl.part"
                part.write_text("".join(json.dumps(row) + "\n" for row in metrics))
                os.replace(part, self.path / "metrics.jsonl")
        return metrics

    def write_metrics(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            with self._writing(), (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def save_checkpoint(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the state after `step` whole, then remove the one before."""
        weights = get_model_state_dict(model, options=_WHOLE)
        state = get_optimizer_state_dict(model, optimizer.optimizer, options=_WHOLE)
        if self.accelerator.is_main_process:
            whole, part = self.path / f"checkpoint-{step}", self.path / f"checkpoint-{step}.part"
            with self._writing(part):
                self.model.save(part, weights)
                save_file(_moments(state), part / "optimizer.safetensors")
                os.replace(part, whole)
                for path in self.path.glob("checkpoint-*"):
                    if path != whole:
                        shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def finish(self, model: nn.Module) -> None:
        """Write the trained model."""
        weights = get_model_state_dict(model, options=_WHOLE)
        if self.accelerator.is_main_process:
            with self._writing():
                self.model.save(self.path / "model", weights)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _writing(self, part: Path | None = None) -> Iterator[None]:
        """Turn a failed write into an error that says what is safe; remove the unfinished `part`."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if part:
                shutil.rmtree(part, ignore_errors=True)
            kept = f"the state after step {step} is safe" if (step := self.latest_step()) else "no state was kept yet"
            raise OSError(
                f"{self.path} cannot be written: {error}; {kept}. Make room, then start the same run again: it goes on"
            ) from error


def _moments(state: dict) -> dict[str, Tensor]:
    """AdamW's tensors of each parameter under one name each."""
    return {f"{parameter}.{name}": held[name] for parameter, held in state["state"].items() for name in held}


def read_metrics(path: str | Path) -> list[dict]:
    """The metrics of a run, one dict a step; a line that a kill has cut off is left out."""
    file = Path(path) / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
