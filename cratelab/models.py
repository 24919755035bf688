"""CRATE and GPT-2 by name, with fresh weights; `cratelab.load` reads those that were saved."""

import torch

from cratelab.arguments import check_seed
from cratelab.crate import Crate, CrateConfig
from cratelab.gpt2 import Gpt2, Gpt2Config
from cratelab.language_model import LanguageModel

MODELS: dict[str, tuple[type[LanguageModel], type]] = {"crate": (Crate, CrateConfig), "gpt2": (Gpt2, Gpt2Config)}


def new_model(
    model: str, preset: str, n_vocab: int, seed: int, context: int | None = None, **settings
) -> LanguageModel:
    """A model with fresh weights, its vocabulary padded to a multiple of 64 as GPT-2's is.

    Args:
        model: "crate" or "gpt2".
        preset: a size, as for `CrateConfig.preset`.
        n_vocab: tokens of what it will read.
        seed: of the weights, below 2³².
        context: the preset's unless given.
        settings: of the configuration, instead of the preset's.

    Raises:
        TypeError: the configuration has no such setting.
        ValueError: there is no such model or preset, a number is out of range, or memory does not hold it.
    """
    check_seed(seed)
    if model not in MODELS:
        raise ValueError(f"no model {model!r}; there are {', '.join(MODELS)}")
    model_class, config_class = MODELS[model]
    overrides = dict(vocab_size=-(-n_vocab // 64) * 64, **settings)
    config = config_class.preset(preset, **overrides | ({} if context is None else {"context": context}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return model_class(config)
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise ValueError(f"memory does not hold {config}: {error}") from error
