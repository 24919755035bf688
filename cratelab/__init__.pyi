from . import corpora
from .coding_rate import (
    coding_rate,
    coding_rate_gradient,
    project,
    rate_reduction,
    sparse_rate_reduction,
    subspace_rate,
    subspace_rate_gradient,
)
from .crate import Crate, CrateConfig
from .devices import best_device
from .gpt2 import Gpt2, Gpt2Config
from .huggingface import to_huggingface
from .ista import Ista, ista, ista_complete, lasso_objective, soft_threshold
from .language_model import LanguageModel, LanguageModelConfig
from .models import load
from .mssa import (
    Mssa,
    attention_map,
    attention_step,
    compression_step,
    gram_attention,
    mssa,
    neumann_gradient,
)

__all__ = [
    "Crate",
    "CrateConfig",
    "Gpt2",
    "Gpt2Config",
    "Ista",
    "LanguageModel",
    "LanguageModelConfig",
    "Mssa",
    "attention_map",
    "attention_step",
    "best_device",
    "coding_rate",
    "coding_rate_gradient",
    "compression_step",
    "corpora",
    "gram_attention",
    "ista",
    "ista_complete",
    "lasso_objective",
    "load",
    "mssa",
    "neumann_gradient",
    "project",
    "rate_reduction",
    "soft_threshold",
    "sparse_rate_reduction",
    "subspace_rate",
    "subspace_rate_gradient",
    "to_huggingface",
]
