"""Small auto-encoders trained with one fault each: exercise 10.E shows their curves, and not which fault is whose."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import Module

from cratelab.corpora import tinyworld
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.experiments.reference_models import load_reference
from cratelab.language_model import LanguageModel
from cratelab.reading import hooked, watch_neurons
from cratelab.sae import Sae, SaeConfig, cross_entropy
from cratelab.sae.learner import Learner

LAYER, STEPS, BATCH, EVERY = 1, 240, 128, 30
FEW, SEEN = 256, 2048  # tokens: of the run that has only few, and on which the others' curves are measured
COLUMNS = "step", "L0", "dead", "explained", "nats lost"
FAULT_OF = {"A": "order", "B": "few", "C": "price", "D": "none", "E": "lengths", "F": "hook", "G": "rate"}


@dataclass
class Run:
    """What a run leaves.

    Attributes:
        sae: the auto-encoder, at the end.
        halfway: the same after half of the steps.
        seen: (n, 256) activations on which its curves were measured.
        fresh: (n, 256) activations on a text that no run has to do with.
        losses: of training, before each step.
        curves: after each 30 steps, by the "step": active features a token, the share of features that are active
            nowhere, explained variance, nats a token lost by the splice; all on `seen`.
    """

    sae: Sae
    halfway: Sae
    seen: Tensor
    fresh: Tensor
    losses: list[float]
    curves: dict[str, list[float]]


@cache
def broken_runs() -> dict[str, Run]:
    """The seven runs of exercise 10.E, by letter; about half a minute, once."""
    seeds = {fault: 1 if fault == "hook" else 0 for fault in FAULT_OF.values()}  # or its curves were those of "none"
    return {letter: train(fault, seeds[fault]) for letter, fault in FAULT_OF.items()}


@cache
def train(fault: str, seed: int) -> Run:
    """512 features of the second layer of the packaged toy GPT-2, learned with a fault, or with "none".

    Weights, text and order follow from `seed`, and torch's own random numbers are left alone. All is in float32.
    """
    model = _model()
    x, few_text, seen_text, fresh_text = _texts(seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, device="cpu")[: STEPS * BATCH]
    if fault == "order":
        order = order.sort().values  # domain by domain
    elif fault == "few":
        x, seen_text = _neurons(model, few_text), few_text
        order = torch.randint(len(x), (STEPS * BATCH,), generator=generator, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        sae = Sae(SaeConfig(x.shape[1], expansion=2, l1=1.0 if fault == "price" else 0.03)).float()
    learner = Learner(sae, learning_rate=0.03 if fault == "rate" else 0.003)
    seen, clean = _neurons(model, seen_text), cross_entropy(model, seen_text)
    losses, rows = [], []
    for step, places in enumerate(order.split(BATCH), 1):
        move = _step_without_normalising if fault == "lengths" else Learner.step
        losses.append(float(move(learner, x[places])))
        if step == STEPS // 2:
            halfway = deepcopy(sae).requires_grad_(False)
        if step % EVERY == 0:
            nats = _spliced(model, seen_text, sae, returned=fault != "hook") - clean
            rows.append((step, *_sparsity_and_fit(sae, seen), nats))
    curves = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
    return Run(sae.requires_grad_(False), halfway, seen, _neurons(model, fresh_text), losses, curves)


def _step_without_normalising(learner: Learner, x: Tensor) -> Tensor:
    loss, _ = learner.loss(x)
    learner.optimizer.zero_grad()
    loss.backward()
    learner.optimizer.step()
    return loss.detach()


@torch.no_grad()
def _sparsity_and_fit(sae: Sae, x: Tensor) -> tuple[float, float, float]:
    code = sae.encode(x)
    error = (sae.decode(code) - x).square().sum() / (x - x.mean(0)).square().sum()
    return float((code > 0).float().sum(1).mean()), float((code == 0).all(0).float().mean()), 1 - float(error)


@torch.no_grad()
def _spliced(model: LanguageModel, text: TokenizedCorpus, sae: Sae, returned: bool) -> float:
    """Cross-entropy with reconstructions in the place of the neurons, if the hook that makes them returns them."""

    def hook(module: Module, inputs: tuple, neurons: Tensor) -> Tensor | None:
        reconstruction = sae(neurons)
        return reconstruction if returned else None

    with hooked((model.blocks[LAYER].neurons, hook)):
        return cross_entropy(model, text)


@cache
def _model() -> LanguageModel:
    return load_reference("gpt2", "toy", 0).float().requires_grad_(False)


@cache
def _texts(seed: int) -> tuple[Tensor, TokenizedCorpus, TokenizedCorpus, TokenizedCorpus]:
    """Activations to learn from, domain by domain, and three texts: a few tokens, and twice some held-out ones."""
    world = tinyworld.generate(STEPS * BATCH, seed=100 + seed, context=128)
    domains = [replace(world, split=world.domain).part(name).corpus() for name in dict.fromkeys(world.domain.tolist())]
    others = [tinyworld.generate(n, seed=200 + 10 * i + seed, context=128) for i, n in enumerate([FEW, SEEN, SEEN])]
    return torch.cat([_neurons(_model(), text) for text in domains]), *(other.corpus() for other in others)


def _neurons(model: LanguageModel, text: TokenizedCorpus) -> Tensor:
    """(n, h) of a layer."""
    return torch.cat([held[LAYER][piece.present] for piece, held in watch_neurons(model, text)])
