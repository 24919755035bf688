"""Training auto-encoders, one for each layer side by side, in one stream of the model's activations.

Nothing random has a state, so a training that was killed goes on to the same weights, bit for bit on one CPU.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.losses import Diverged
from cratelab.reading import check_vocabulary
from cratelab.sae.activations import ActivationBlocks, mixed
from cratelab.sae.architectures import ARCHITECTURES, SaeConfig
from cratelab.sae.autoencoder import Sae
from cratelab.sae.fidelity import check_text, evaluate_sae
from cratelab.sae.learner import Learner
from cratelab.sae.run_folder import Progress, RunFolder
from cratelab.sae.sae_recipe import SaeRecipe
from cratelab.storage import finite


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

    With a `run_dir` the processes that Accelerate or torchrun have started share the layers, at most one process a
    layer; each auto-encoder is, bit for bit, what one process makes.

    For "relu" the loss is that of the paper, the mean over tokens of ‖x̂ − x‖²/‖x‖² + λ Σ|f| (eq-10-2); for "batchtopk"
    its first term alone, with the k·n largest of the n tokens' codes kept (eq-10-4). ‖x‖² counts as no less than a
    hundredth of its mean, so that silent tokens do not rule. Rows of W_dec keep unit length: the part of the gradient
    along them is removed.

    Args:
        model: any, on any device and of any dtype; its weights stay as they are. The auto-encoders are of float32.
        training: pieces of its documents are drawn at random, with replacement.
        validation: text for the curve and the decision to stop.
        config: of every layer's auto-encoder.
        layers: counted from 0; all unless given.
        recipe: how.
        run_dir: folder for `run.json`, the latest checkpoint and, in the end, `layer-0`, …, to be read by `Sae.load` or
            SAELens, on a disk that all processes see. Without one, nothing is written, and each process trains all.

    Returns:
        Of several processes each has the whole curve and the auto-encoders that it trained.

    Raises:
        ValueError: model, corpora and configuration do not fit one another, activations are not finite, `run_dir` holds
            another run, its checkpoint is damaged, or there are more processes than layers.
        BlockingIOError: somebody else trains in `run_dir`.
        OSError: a file cannot be written, such as on a full disk; the latest checkpoint is whole.
        Diverged: a loss or a weight is no finite number; the latest checkpoint is from before.
    """
    recipe = recipe or SaeRecipe()
    layers = list(range(len(model.blocks)) if layers is None else layers)
    _check(model, training, validation, config, layers, recipe)
    layers = [int(layer) for layer in layers]
    arguments = model, training, validation, config, layers, recipe
    with RunFolder.open(run_dir, *arguments) if run_dir else nullcontext() as run:
        return _train(*arguments, run)


def _train(
    model: LanguageModel,
    training: TokenizedCorpus,
    validation: TokenizedCorpus,
    config: SaeConfig,
    layers: list[int],
    recipe: SaeRecipe,
    run: RunFolder | None,
) -> SaeTraining:
    own = run.own(layers) if run else layers
    gathered = run.gathered if run else dict
    learners = _new_learners(model, config, layers, own, recipe)
    saes = {layer: learner.sae for layer, learner in learners.items()}
    progress = run.resume(learners) if run else Progress()
    blocks = ActivationBlocks(model, training, own, recipe.buffer, recipe.seed)
    if not progress.stopped:
        old = blocks.read(progress.block)
        if progress.block == 0:
            for sae, x in zip(saes.values(), old, strict=True):
                sae.b_dec.data = x.mean(0)
    total, n_steps = 0.0, 0  # losses (l,) since the last evaluation
    quiet = None if own[0] == layers[0] else True  # of several processes one shows how far they are
    with tqdm(total=recipe.max_tokens, initial=progress.tokens, unit="token", unit_scale=True, disable=quiet) as bar:
        while not progress.stopped:
            new, before = blocks.read(progress.block + 1), progress.tokens
            for batch in mixed(old, new, recipe.batch):
                for learner in learners.values():
                    learner.optimizer.param_groups[0]["lr"] = recipe.rate(progress.tokens)
                total += torch.stack([each.step(x) for each, x in zip(learners.values(), batch, strict=True)])
                n_steps += 1
                progress.tokens += batch.shape[1]
                bar.update(batch.shape[1])
            progress.block, old = progress.block + 1, new
            mean_losses = dict(zip(own, (total / n_steps).tolist(), strict=True))
            _check_finite(learners, mean_losses, progress, run)
            evaluate, resample = recipe.due(before, progress.tokens)
            if evaluate:
                rows = _evaluate(model, validation, saes, recipe, mean_losses, progress, run)
                progress.curve += gathered(rows).values()
                progress.stopped = recipe.reason_to_stop(progress.curve)
                total, n_steps = 0.0, 0
            if resample and not progress.stopped:
                dead = gathered({layer: each.n_dead(recipe.patience) for layer, each in learners.items()})
                for layer, x in zip(own, old, strict=True):
                    drawn = sum(dead[earlier] for earlier in layers[: layers.index(layer)])
                    draw = np.random.PCG64([recipe.seed, 1, progress.block]).advance(drawn)  # one draw for all layers
                    learners[layer].resample(x, recipe.patience, np.random.Generator(draw))
            if evaluate and run:
                run.save_checkpoint(learners, progress)
    for sae in saes.values():
        sae.eval()
    if run:
        run.finish(saes, model)
    return SaeTraining(saes, progress.curve, progress.stopped)


def _new_learners(
    model: LanguageModel, config: SaeConfig, layers: list[int], own: list[int], recipe: SaeRecipe
) -> dict[int, Learner]:
    """The process's own, as they are if it draws those of all layers."""
    device, learners = model.token_embedding.weight.device, {}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        for layer in layers:
            sae = Sae(config)
            if layer in own:
                learners[layer] = Learner(sae.to(device), recipe.learning_rate)
    return learners


def _evaluate(
    model: LanguageModel,
    validation: TokenizedCorpus,
    saes: dict[int, Sae],
    recipe: SaeRecipe,
    losses: dict[int, float],
    progress: Progress,
    run: RunFolder | None,
) -> dict[int, dict]:
    """Of each layer a row of the curve."""
    scores = evaluate_sae(model, validation, saes, recipe.validation_tokens)
    if lost := [layer for layer in saes if not math.isfinite(scores[layer].ce_spliced)]:
        raise _diverged(f"spliced in, layers {lost} leave the model no finite loss", progress, run)
    rows = {}
    for layer, sae in saes.items():
        measured = {name: getattr(scores[layer], name) for name in ("l0", "explained_variance", "recovered", "dead")}
        row = {"tokens": progress.tokens, "layer": layer, "loss": losses[layer]}
        rows[layer] = finite(row | measured | {"threshold": float(sae.threshold[0])})
    return rows


def _check_finite(
    learners: dict[int, Learner], losses: dict[int, float], progress: Progress, run: RunFolder | None
) -> None:
    lost = [layer for layer, learner in learners.items() if not learner.is_finite()]
    if lost or not all(map(math.isfinite, losses.values())):
        what = f"the losses of layers {list(losses)} are {list(losses.values())}"
        raise _diverged(what + f", the weights of layers {lost} are not finite" * bool(lost), progress, run)


def _diverged(what: str, progress: Progress, run: RunFolder | None) -> Diverged:
    kept = f"; {latest} is from before" if run and (latest := run.latest()) else ""
    return Diverged(f"after {progress.tokens} tokens {what}: a lower learning rate often helps{kept}")


def _check(model: LanguageModel, training, validation, config: SaeConfig, layers: list, recipe: SaeRecipe) -> None:
    width = model.config.n_neurons
    if not ARCHITECTURES[config.kind].trained:
        others = " or ".join(f'"{kind}"' for kind, each in ARCHITECTURES.items() if each.trained)
        raise ValueError(f'"{config.kind}" is read from files, not trained: choose {others}')
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
