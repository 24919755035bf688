"""Training auto-encoders, one for each layer side by side, in one stream of the model's activations.

Nothing random has a state: which text is read, and in which order its tokens are served, is drawn anew from
`[seed, number of the block]`. So a training that was killed goes on to the same weights, bit for bit on one CPU.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from cratelab.arguments import check_seed, check_whole
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.provenance import provenance
from cratelab.reading import check_vocabulary, pieces_of, watch_neurons
from cratelab.run_directory import check_same_run
from cratelab.sae.autoencoder import Sae, SaeConfig
from cratelab.sae.evaluation import SaeScores, check_text, evaluate_sae
from cratelab.sae.learner import Learner
from cratelab.storage import (
    digest_of,
    digest_of_tensors,
    finite,
    locked,
    read_tensors,
    remove_leftovers,
    write_json,
    write_tensors,
)
from cratelab.training import Diverged


@dataclass
class SaeRecipe:
    """How to train auto-encoders.

    The defaults suit small models. In 100,000 tokens of a toy's neurons, with λ = 0.01 and four features a neuron, they
    come to 70 to 100 active features a token; the paper's rate of 4e-4, with batches of 1,024, to 300.

    Attributes:
        max_tokens: where training ends at the latest.
        batch: tokens a step.
        learning_rate: Adam's, constant.
        buffer: tokens whose activations are held; half of it is read at a time.
        resample_at: when dead features are born again, as shares of `max_tokens`.
        evaluations: how many, evenly over `max_tokens`; after each there is a checkpoint.
        validation_tokens: read in each.
        least_gain: training ends when over its last quarter no layer's recovered loss has gained this much, nor has its
            training loss fallen by this share. The first alone would end it too early: recovered loss of small models
            nears 1 long before the code is sparse.
        seed: 0 to 2³² − 1, of the weights, the text and its order.

    Raises:
        ValueError: a value is of another type or out of range.
    """

    max_tokens: int = 500_000
    batch: int = 256
    learning_rate: float = 3e-3
    buffer: int = 65_536
    resample_at: tuple[float, ...] = (0.1, 0.2, 0.5, 0.75)
    evaluations: int = 16
    validation_tokens: int = 8192
    least_gain: float = 0.01
    seed: int = 0

    def __post_init__(self):
        try:
            self.resample_at = tuple(self.resample_at)
        except TypeError as error:
            raise ValueError(f"resample_at must be shares of max_tokens, or (); got {self.resample_at!r}") from error
        for name in "max_tokens", "batch", "buffer", "evaluations", "validation_tokens":
            check_whole(name, getattr(self, name))
        check_seed(self.seed)
        if not all(isinstance(share, Real) and 0 <= share < math.inf for share in self.resample_at):
            raise ValueError(f"resample_at must be shares of max_tokens, finite and at least 0; got {self.resample_at}")
        for name in "learning_rate", "least_gain":
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number; got {getattr(self, name)!r}")
        if not (0 < self.learning_rate < math.inf and math.isfinite(self.least_gain)):
            raise ValueError(
                f"the learning rate must be positive and the least gain finite; got {self.learning_rate} and "
                f"{self.least_gain}"
            )


@dataclass
class SaeTraining:
    """What `train_saes` returns.

    Attributes:
        saes: by layer.
        curve: one dict for each evaluation and layer: tokens, layer, loss (mean since the last), l0,
            explained_variance, recovered, dead and threshold, on the validation text; None for what is undefined, as
            the explained variance and the recovered loss of a layer whose neurons are silent.
        stopped: why training ended.
    """

    saes: dict[int, Sae]
    curve: list[dict]
    stopped: str


def train_saes(
    model: LanguageModel,
    training: TokenizedCorpus,
    validation: TokenizedCorpus,
    config: SaeConfig,
    layers: Sequence[int] | None = None,
    recipe: SaeRecipe | None = None,
    run_dir: str | Path | None = None,
) -> SaeTraining:
    """Train one auto-encoder on the neurons of each layer. With a `run_dir` a killed call goes on where it stopped.

    For "relu" the loss is that of the paper, the mean over tokens of ‖x̂ − x‖²/‖x‖² + λ Σ|f| (eq-10-2); for "batchtopk"
    its first term alone, with the k·n largest of the n tokens' codes kept (eq-10-3). ‖x‖² counts as no less than a
    hundredth of its mean, so that silent tokens do not rule. Rows of W_dec keep unit length: the part of the gradient
    along them is removed.

    Args:
        model: any, on any device and of any dtype; its weights stay as they are. The auto-encoders are of float32.
        training: pieces of its documents are drawn at random, with replacement.
        validation: text for the curve and the decision to stop.
        config: of every layer's auto-encoder.
        layers: counted from 0; all unless given.
        recipe: how.
        run_dir: folder for `run.json`, the latest `checkpoint.safetensors` and, in the end, `layer-0`, …, to be read by
            `Sae.load` or SAELens. Without one, nothing is written.

    Raises:
        ValueError: model, corpora and configuration do not fit one another, activations are not finite, `run_dir` holds
            another run, or its checkpoint is damaged.
        BlockingIOError: another process trains in `run_dir`.
        OSError: a file cannot be written, such as on a full disk; the latest checkpoint is whole.
        Diverged: a loss or a weight is no finite number; the latest checkpoint is from before.
    """
    recipe = recipe or SaeRecipe()
    layers = list(range(len(model.blocks)) if layers is None else layers)
    _check(model, training, validation, config, layers, recipe)
    layers = [int(layer) for layer in layers]
    run = _Run(Path(run_dir), model, training, validation, config, layers, recipe) if run_dir else None
    with run.held() if run else nullcontext():
        return _train(model, training, validation, config, layers, recipe, run)


def _train(model, training, validation, config: SaeConfig, layers: list[int], recipe: SaeRecipe, run) -> SaeTraining:
    pieces = np.array(list(pieces_of(training, model.config.context, True, len(training))))
    learners = _new_learners(model, config, layers, recipe)
    state = run.resume(learners) if run else None
    state = state or {"block": 0, "tokens": 0, "curve": [], "stopped": ""}

    def read(block: int) -> Tensor:
        return _read_block(model, training, pieces, layers, recipe, block)

    if not state["stopped"]:
        old = read(state["block"])
        if state["block"] == 0:
            for learner, x in zip(learners, old, strict=True):
                learner.sae.b_dec.data = x.mean(0)
    total, steps = 0.0, 0
    with tqdm(total=recipe.max_tokens, initial=state["tokens"], unit="token", unit_scale=True, disable=None) as bar:
        while not state["stopped"]:
            new, before = read(state["block"] + 1), state["tokens"]
            late, early = old[:, old.shape[1] // 2 :], new[:, : new.shape[1] // 2]
            most = max(late.shape[1], early.shape[1])  # else some are empty
            n_batches = min(most, max(1, (late.shape[1] + early.shape[1]) // recipe.batch))
            for halves in zip(late.tensor_split(n_batches, 1), early.tensor_split(n_batches, 1), strict=True):
                batch = torch.cat(halves, 1)
                total += torch.stack([learner.step(x) for learner, x in zip(learners, batch, strict=True)])
                state["tokens"] += batch.shape[1]
                bar.update(batch.shape[1])
            state["block"], steps = state["block"] + 1, steps + n_batches
            mean_loss = total / steps
            lost = [layer for layer, each in zip(layers, learners, strict=True) if not each.is_finite()]
            if lost or not mean_loss.isfinite().all():
                losses = f"the losses of layers {layers} are {mean_loss.tolist()}"
                raise _diverged(state, losses + f", the weights of layers {lost} are not finite" * bool(lost), run)
            old = new

            evaluations = [(i + 1) / recipe.evaluations for i in range(recipe.evaluations)]
            due, reborn = (
                any(before < share * recipe.max_tokens <= state["tokens"] for share in shares)
                for shares in (evaluations, recipe.resample_at)
            )
            if due:
                saes = {layer: learner.sae for layer, learner in zip(layers, learners, strict=True)}
                scores = evaluate_sae(model, validation, saes, recipe.validation_tokens)
                if lost := [layer for layer in layers if not math.isfinite(scores[layer].ce_spliced)]:
                    raise _diverged(state, f"spliced in, layers {lost} leave the model no finite loss", run)
                for layer, loss in zip(layers, mean_loss.tolist(), strict=True):
                    state["curve"].append(_row(state["tokens"], layer, loss, scores[layer], saes[layer]))
                total, steps = 0.0, 0
                state["stopped"] = _reason_to_stop(state["curve"], recipe)
            if reborn and not state["stopped"]:
                draw = np.random.default_rng([recipe.seed, 1, state["block"]])
                for learner, x in zip(learners, old, strict=True):
                    learner.resample(x, recipe.max_tokens // 20, draw)
            if due and run:
                run.checkpoint(learners, state)
    saes = {layer: learner.sae.eval() for layer, learner in zip(layers, learners, strict=True)}
    if run:
        run.finish(saes, model)
    return SaeTraining(saes, state["curve"], state["stopped"])


def _diverged(state: dict, what: str, run: "_Run | None") -> Diverged:
    kept = f"; {run.file} is from before" if run and run.file.is_file() else ""
    return Diverged(f"after {state['tokens']} tokens {what}: a lower learning rate often helps{kept}")


def _new_learners(model: LanguageModel, config: SaeConfig, layers: Iterable[int], recipe: SaeRecipe) -> list[Learner]:
    device = model.token_embedding.weight.device
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return [Learner(Sae(config).to(device), recipe.learning_rate) for _ in layers]


def _read_block(
    model: LanguageModel, corpus: TokenizedCorpus, pieces: np.ndarray, layers: list[int], recipe: SaeRecipe, block: int
) -> Tensor:
    """Activations (l, n, d_in) of half a buffer of random pieces of text, in random order."""
    draw = np.random.default_rng([recipe.seed, 0, block])
    drawn = pieces[draw.integers(len(pieces), size=max(1, recipe.buffer // 2 // model.config.context))]
    tokens = np.concatenate([corpus[start:stop] for start, stop in drawn])
    document = np.repeat(np.arange(len(drawn)), drawn[:, 1] - drawn[:, 0])
    text_drawn = TokenizedCorpus.from_arrays(tokens, document, ["drawn"] * len(drawn), corpus.n_vocab)
    device = model.token_embedding.weight.device
    order = torch.from_numpy(draw.permutation(len(tokens))).to(device)
    held = torch.empty(len(layers), len(tokens), model.config.expansion * model.config.width, device=device)
    at = 0
    for text, neurons in watch_neurons(model, text_drawn, batch=16, ahead=len(drawn)):
        places = order[at : at + int(text.present.sum())]
        for each, layer in zip(held, layers, strict=True):
            each[places] = neurons[layer][text.present].float()
        at += len(places)
    for each, layer in zip(held, layers, strict=True):
        if not each.isfinite().all():
            raise ValueError(f"activations of layer {layer} are not finite: is the model damaged, or did it diverge?")
    return held


def _row(tokens: int, layer: int, loss: float, scores: SaeScores, sae: Sae) -> dict:
    names = "l0", "explained_variance", "recovered", "dead"
    measured = {name: getattr(scores, name) for name in names}
    row = {"tokens": tokens, "layer": layer, "loss": loss} | measured | {"threshold": float(sae.threshold[0])}
    return finite(row)


def _reason_to_stop(curve: list[dict], recipe: SaeRecipe) -> str:
    """Empty while there is none."""
    tokens = curve[-1]["tokens"]
    if tokens >= recipe.max_tokens:
        return f"all {tokens} tokens were read"
    then = {row["layer"]: row for row in curve if row["tokens"] <= 0.75 * tokens}
    if tokens < recipe.max_tokens / 4 or not then:
        return ""
    now = {row["layer"]: row for row in curve}
    pairs = [(now[i]["recovered"], then[i]["recovered"]) for i in now]
    gain = max((after - before for after, before in pairs if None not in (after, before)), default=0.0)
    losses = [(now[i]["loss"], then[i]["loss"]) for i in now]
    fall = max(1 - after / before if before > 1e-12 else 0.0 for after, before in losses)  # silent layers have no loss
    if max(gain, fall) >= recipe.least_gain:
        return ""
    return (
        f"in the last quarter of {tokens} tokens recovered loss gained {gain:.2%} at most, "
        f"and the training loss fell by {fall:.2%} at most"
    )


def _check(model: LanguageModel, training, validation, config: SaeConfig, layers: list, recipe: SaeRecipe) -> None:
    width = model.config.expansion * model.config.width
    if config.kind == "jumprelu":
        raise ValueError('"jumprelu" is read from files, not trained: choose "relu" or "batchtopk"')
    if config.d_in != width:
        raise ValueError(f"the model has {width} neurons a layer, the auto-encoder reads {config.d_in}")
    known = range(len(model.blocks))
    whole = all(isinstance(i, Integral) and not isinstance(i, bool) and i in known for i in layers)
    if not layers or not whole or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be some of 0 to {known[-1]}, each once; got {layers}")
    for name, corpus in ("training", training), ("validation", validation):
        check_vocabulary(model, corpus, f"{name} corpus")
    if not len(training):
        raise ValueError("the training corpus holds no token")
    check_text(model, validation, recipe.validation_tokens)


class _Run:
    """The folder of one training, for one process at a time."""

    def __init__(self, path: Path, model: LanguageModel, training, validation, config, layers, recipe):
        self.path, self.file = path, path / "checkpoint.safetensors"
        self.facts = {
            "model": {"model": model.kind, **asdict(model.config), "sha256": digest_of_tensors(model.state_dict())},
            "training": training.facts(),
            "validation": validation.facts(),
            "sae": asdict(config) | {"layers": layers},
            "recipe": asdict(recipe) | {"resample_at": list(recipe.resample_at)},
        }

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin the run, or go on with it; nobody else can meanwhile.

        Raises:
            ValueError: the folder holds another run, or other files.
            BlockingIOError: another process trains there.
        """
        check_same_run(self.path, self.facts)
        busy = f"another process trains in {self.path}: wait for it, or choose another folder"
        with locked(self.path / "lock", busy):
            check_same_run(self.path, self.facts)  # it may have begun one
            for name in ("run.json", "checkpoint.safetensors"):
                remove_leftovers(self.path / name)
            if not (self.path / "run.json").is_file():
                write_json(self.path / "run.json", self.facts | {"provenance": provenance()})
            yield

    def resume(self, learners: list[Learner]) -> dict | None:
        """Load the latest checkpoint, if any; where in the stream it is."""
        if not self.file.exists():
            return None
        try:
            tensors = read_tensors(self.file)
            with safe_open(self.file, "pt") as opened:
                metadata = opened.metadata()
            if metadata["run"] != self._digest(metadata["state"]):
                raise ValueError("its content is not what was written for this run")
            state = json.loads(metadata["state"])
            for i, learner in enumerate(learners):
                mine = {name.removeprefix(f"{i}/"): held for name, held in tensors.items() if name.startswith(f"{i}/")}
                learner.load(mine)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.file} is damaged, or no checkpoint of this run: {error}. Remove it, and the run begins anew"
            ) from error
        return state

    def checkpoint(self, learners: list[Learner], state: dict) -> None:
        tensors = {f"{i}/{name}": held for i, each in enumerate(learners) for name, held in each.tensors().items()}
        as_text = json.dumps(state)
        write_tensors(self.file, tensors, {"state": as_text, "run": self._digest(as_text)})

    def _digest(self, state: str) -> str:
        """Of this run and where in the stream its checkpoint is; that of the tensors is `write_tensors`'s."""
        return digest_of([self.facts, state])

    def finish(self, saes: dict[int, Sae], model: LanguageModel) -> None:
        for layer, sae in saes.items():
            sae.save(self.path / f"layer-{layer}", model_name=model.kind, hook_name=f"blocks.{layer}.neurons")
