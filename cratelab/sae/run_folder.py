"""What a training of auto-encoders leaves on disk, so that a kill costs little, and how several processes share one.

    run.json                               model, text, configuration, recipe, provenance
    checkpoint-31232/layer-3.safetensors   auto-encoder and optimizer after so many tokens
    checkpoint-31232/progress.json         written last, when all layers are there
    layer-3                                the trained auto-encoder
    lock                                   held while somebody trains here

Of P processes, process r trains every P-th layer from the r-th on, just as one process would, and writes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from accelerate.utils import gather_object

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.devices import processes
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
    read_json,
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
    """The folder of one training. All processes hold it."""

    def __init__(self, path: Path, facts: dict[str, dict]):
        self.path, self.facts, self.process = path, facts, processes()

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
            ValueError: `path` holds another run, or other files; or there are more processes than layers.
            BlockingIOError: somebody else trains there.
        """
        facts = {
            "model": {"model": model.kind, **asdict(model.config), "sha256": digest_of_tensors(model.state_dict())},
            "training": training.facts(),
            "validation": validation.facts(),
            "sae": asdict(config) | {"layers": layers},
            "recipe": asdict(recipe) | {"resample_at": list(recipe.resample_at)},
        }
        run = cls(Path(path), facts)
        if (n := run.process.num_processes) > len(layers):
            raise ValueError(f"every process trains whole layers, and there are {n} for {len(layers)}: start fewer")
        check_same_run(run.path, facts)
        busy = f"another process trains in {path}: wait for it, or choose another folder"
        with locked(run.path / "lock", busy) if run.process.is_main_process else nullcontext():
            check_same_run(run.path, facts)  # of one that has begun since
            run.process.wait_for_everyone()
            if run.process.is_main_process:
                run._clean()
                if not (run.path / "run.json").is_file():
                    write_json(run.path / "run.json", facts | {"provenance": provenance(processes=n)})
            run.process.wait_for_everyone()
            yield run

    def own(self, layers: list[int]) -> list[int]:
        """Which of the layers this process trains."""
        return layers[self.process.process_index :: self.process.num_processes]

    def gathered(self, by_layer: dict[int, object]) -> dict[int, object]:
        """What all processes hold, each of its own layers."""
        found = dict(gather_object(list(by_layer.items())))
        return {layer: found[layer] for layer in self.facts["sae"]["layers"]}

    def latest(self) -> Path | None:
        """The folder of the latest checkpoint, if there is one."""
        whole = [folder for folder in self._checkpoints() if (folder / "progress.json").is_file()]
        return max(whole, key=_tokens, default=None)

    def resume(self, learners: dict[int, Learner]) -> Progress:
        """Load the latest checkpoint, if any, into the learners by layer; where in the stream it is.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        if not (folder := self.latest()):
            return Progress()
        file = folder / "progress.json"
        try:
            held = read_json(file)
            told = held.pop("run")
            if told != self._digest(held) or held["tokens"] != _tokens(folder):
                raise ValueError("its content is not what was written for this run")
            for layer, learner in learners.items():
                file = folder / f"layer-{layer}.safetensors"
                if read_metadata(file)["run"] != self._digest([layer, told]):
                    raise ValueError("it was not written for this run, layer and place in the stream")
                learner.load(read_tensors(file))
        except (KeyError, TypeError, ValueError, RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"{file} is damaged, or of no checkpoint of this run: {error}. Remove {folder}, and the run begins anew"
            ) from error
        return Progress(**held)

    def save_checkpoint(self, learners: dict[int, Learner], progress: Progress) -> None:
        """Write down all that `resume` needs, then remove the checkpoint before."""
        folder = self.path / f"checkpoint-{progress.tokens}"
        folder.mkdir(exist_ok=True)
        held = asdict(progress)
        digest = self._digest(held)
        for layer, learner in learners.items():
            told = {"run": self._digest([layer, digest])}
            write_tensors(folder / f"layer-{layer}.safetensors", learner.tensors(), told)
        self.process.wait_for_everyone()
        if self.process.is_main_process:
            write_json(folder / "progress.json", held | {"run": digest})
            self._remove_all_but(folder)

    def finish(self, saes: dict[int, Sae], model: LanguageModel) -> None:
        """Write the auto-encoder of each layer; all are there when it returns."""
        for layer, sae in saes.items():
            sae.save(self.folder(layer), model_name=model.kind, hook_name=f"blocks.{layer}.neurons")
        self.process.wait_for_everyone()

    def folder(self, layer: int) -> Path:
        """Where a layer's auto-encoder is written in the end."""
        return self.path / f"layer-{layer}"

    def _checkpoints(self) -> list[Path]:
        """Whole or not."""
        names = "checkpoint-[1-9][0-9]*"
        return [folder for folder in self.path.glob(names) if folder.is_dir() and folder.name[11:].isdecimal()]

    def _remove_all_but(self, latest: Path | None) -> None:
        for folder in self._checkpoints():
            if folder != latest:
                for file in [folder / "progress.json", *folder.glob("layer-*.safetensors")]:
                    file.unlink(missing_ok=True)
                with suppress(OSError):  # something else is in it
                    folder.rmdir()

    def _clean(self) -> None:
        """Remove what killed processes have left half-written."""
        remove_leftovers(self.path, "run.json")
        for folder in self._checkpoints():
            remove_leftovers(folder, "layer-*", "progress.json")
        self._remove_all_but(self.latest())
        for layer in self.facts["sae"]["layers"]:
            remove_leftovers(self.folder(layer), *FILES)

    def _digest(self, content: object) -> str:
        """Of content of this run; that of tensors is `write_tensors`'s."""
        return digest_of([self.facts, content])


def _tokens(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
