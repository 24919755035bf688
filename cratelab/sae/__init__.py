"""Sparse auto-encoders: a sparse code bolted on to the neurons of a trained model (chapter 10)."""

from cratelab.sae.autoencoder import Sae, SaeConfig
from cratelab.sae.evaluation import SaeScores, cross_entropy, evaluate_sae
from cratelab.sae.splicing import splice
from cratelab.sae.training import SaeRecipe, SaeTraining, train_saes

__all__ = [
    "Sae",
    "SaeConfig",
    "SaeRecipe",
    "SaeScores",
    "SaeTraining",
    "cross_entropy",
    "evaluate_sae",
    "splice",
    "train_saes",
]
