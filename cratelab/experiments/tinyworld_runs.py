"""Runs on TinyWorld: models of width 64 that differ in one thing at a time (chapters 7 and 9)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cratelab.corpora import tinyworld
from cratelab.language_model import LanguageModel
from cratelab.losses import document_log_probs
from cratelab.models import new_model
from cratelab.recipe import Recipe
from cratelab.training import train

CONTEXT = 64  # TinyWorld's documents are as long, and one token to predict
N_TOKENS = 800_000


@dataclass(frozen=True)
class Setting:
    """One kind of run on TinyWorld.

    Attributes:
        model: "crate" or "gpt2".
        n_layers: of them.
        steps: of 8 windows of 64 tokens.
        peak_rate: the largest learning rate; the last is a tenth of it.
        lam: CRATE's λ.
        top_k: GPT-2's neurons of a token that may be active; None for all.
        span: how many tokens back a layer may look; None for all.
    """

    model: str
    n_layers: int
    steps: int
    peak_rate: float
    lam: float = 0.1
    top_k: int | None = None
    span: int | None = None

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.n_layers}L", f"{self.steps}", f"{self.peak_rate:g}"]
        parts += [f"lam{self.lam:g}"] * (self.lam != 0.1)
        parts += [f"{key}{value}" for key, value in (("top", self.top_k), ("span", self.span)) if value is not None]
        return "-".join(parts)

    def new(self, n_vocab: int, seed: int) -> LanguageModel:
        """The model with fresh weights."""
        own = {"lam": self.lam} if self.model == "crate" else {"top_k": self.top_k}
        return new_model(self.model, "toy", n_vocab, seed, CONTEXT, n_layers=self.n_layers, span=self.span, **own)

    def recipe(self, seed: int) -> Recipe:
        """How it is trained."""
        rates = {"peak_rate": self.peak_rate, "final_rate": self.peak_rate / 10}
        return Recipe.preset("toy", steps=self.steps, batch=8, seed=seed, validate_every=self.steps, **rates)

    def train(
        self, world: tinyworld.World, seed: int, folder: str | Path, on_step: Callable[[dict], None] | None = None
    ) -> tuple[LanguageModel, Path]:
        """The trained model, and the folder in `folder` where its run is kept; one that is done is read."""
        training, validation = (world.part(part).corpus() for part in ("train", "validation"))
        model, run_dir = self.new(training.n_vocab, seed), Path(folder) / f"{self.name}-{seed}"
        train(model, training, validation, self.recipe(seed), run_dir, on_step)
        return model.eval(), run_dir


def new_world() -> tinyworld.World:
    """What all of them read."""
    return tinyworld.generate(N_TOKENS, context=CONTEXT + 1)


def fresh_text(seed: int) -> tinyworld.World:
    """Some 42,000 tokens of documents that no model has trained on, others for every seed."""
    world = tinyworld.generate(400_000, seed=1000 + seed, context=CONTEXT + 1)
    world.split[world.split != "train"] = "validation"  # a document that was trained on has the same split everywhere
    return world.part("validation")


def gap(model: LanguageModel, part: tinyworld.World) -> float:
    """Nats a token by which the model's loss on whole documents is above the floor that no model can pass (eq-07-2)."""
    return float(np.nanmean(part.log_prob - document_log_probs(model, part.corpus())))
