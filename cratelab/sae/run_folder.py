"""What a training of auto-encoders leaves on disk, so that a kill costs little."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.provenance import provenance
from cratelab.run_directory import check_same_run
from cratelab.sae.architectures import SaeConfig
from cratelab.sae.autoencoder import FILES, Sae
from cratelab.sae.learner import Learner
from cratelab.sae.sae_recipe import SaeRecipe
from cratelab.storage import (
    digest_of,
    digest_of_tensors,
    locked,
    read_metadata,
    read_tensors,
    remove_leftovers,
    write_json,
    write_tensors,
)


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        block: of activations, the first of the two that come next.
        tokens: learnt from.
        curve: as `SaeTraining` has it.
        stopped: why training ended; empty until then.
    """

    block: int = 0
    tokens: int = 0
    curve: list[dict] = field(default_factory=list)
    stopped: str = ""


class RunFolder:
    """The folder of one training."""

    def __init__(self, path: Path, facts: dict[str, dict]):
        self.path, self.facts, self.file = path, facts, path / "checkpoint.safetensors"

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | Path,
        model: LanguageModel,
        training: TokenizedCorpus,
        validation: TokenizedCorpus,
        config: SaeConfig,
        layers: list[int],
        recipe: SaeRecipe,
    ) -> Iterator[Self]:
        """Begin a run in `path`, or go on with the one that is there; nobody else can while the block lasts.

        Raises:
            ValueError: `path` holds another run, or other files.
            BlockingIOError: another process trains there.
        """
        facts = {
            "model": {"model": model.kind, **asdict(model.config), "sha256": digest_of_tensors(model.state_dict())},
            "training": training.facts(),
            "validation": validation.facts(),
            "sae": asdict(config) | {"layers": layers},
            "recipe": asdict(recipe) | {"resample_at": list(recipe.resample_at)},
        }
        run = cls(Path(path), facts)
        check_same_run(run.path, facts)
        busy = f"another process trains in {path}: wait for it, or choose another folder"
        with locked(run.path / "lock", busy):
            check_same_run(run.path, facts)  # of one that has begun since
            run._clean()
            if not (run.path / "run.json").is_file():
                write_json(run.path / "run.json", facts | {"provenance": provenance()})
            yield run

    def resume(self, learners: Iterable[Learner]) -> Progress:
        """Load the latest checkpoint, if any, into the learners; where in the stream it is.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        if not self.file.exists():
            return Progress()
        try:
            tensors = read_tensors(self.file)
            metadata = read_metadata(self.file)
            if metadata["run"] != self._digest(metadata["state"]):
                raise ValueError("its content is not what was written for this run")
            progress = Progress(**json.loads(metadata["state"]))
            for i, learner in enumerate(learners):
                mine = {name.removeprefix(f"{i}/"): held for name, held in tensors.items() if name.startswith(f"{i}/")}
                learner.load(mine)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.file} is damaged, or no checkpoint of this run: {error}. Remove it, and the run begins anew"
            ) from error
        return progress

    def save_checkpoint(self, learners: Iterable[Learner], progress: Progress) -> None:
        """Write down all that `resume` needs, whole or not at all."""
        tensors = {f"{i}/{name}": held for i, each in enumerate(learners) for name, held in each.tensors().items()}
        as_text = json.dumps(asdict(progress))
        write_tensors(self.file, tensors, {"state": as_text, "run": self._digest(as_text)})

    def finish(self, saes: dict[int, Sae], model: LanguageModel) -> None:
        """Write the auto-encoder of each layer."""
        for layer, sae in saes.items():
            sae.save(self.folder(layer), model_name=model.kind, hook_name=f"blocks.{layer}.neurons")

    def folder(self, layer: int) -> Path:
        """Where a layer's auto-encoder is written in the end."""
        return self.path / f"layer-{layer}"

    def _clean(self) -> None:
        """Remove what killed processes have left half-written."""
        remove_leftovers(self.path, "run.json", self.file.name)
        for layer in self.facts["sae"]["layers"]:
            remove_leftovers(self.folder(layer), *FILES)

    def _digest(self, state: str) -> str:
        """Of this run and where in the stream its checkpoint is; that of the tensors is `write_tensors`'s."""
        return digest_of([self.facts, state])
