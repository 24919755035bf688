"""Sparse auto-encoders: a sparse code bolted on to the neurons of a trained model (chapter 10)."""

from cratelab.sae.architectures import SaeConfig
from cratelab.sae.autoencoder import Sae
from cratelab.sae.fidelity import SaeScores, cross_entropy, evaluate_sae
from cratelab.sae.sae_recipe import SaeRecipe
from cratelab.sae.splicing import on_residual, splice
from cratelab.sae.trainer import SaeTraining, train_saes

__all__ = [
    "Sae",
    "SaeConfig",
    "SaeRecipe",
    "SaeScores",
    "SaeTraining",
    "cross_entropy",
    "evaluate_sae",
    "on_residual",
    "splice",
    "train_saes",
]
