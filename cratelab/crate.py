"""CRATE, the language model whose blocks are one step of MSSA and two of ISTA (chapter 5)."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from torch import nn

from cratelab.crate_block import CrateBlock
from cratelab.language_model import LanguageModel, LanguageModelConfig
from cratelab.storage import read_json, read_tensors
from cratelab.weights import drop_tied_head, read_weights, renamed


@dataclass
class CrateConfig(LanguageModelConfig):
    """`LanguageModelConfig` and the constants of ISTA, officially fixed.

    Attributes:
        step_size: η.
        lam: λ; the threshold of a step is ηλ.
        n_steps: T, ISTA steps from a zero code; at most 1000.
        ista_residual: add the tokens to D A; officially not.
    """

    step_size: float = 0.1
    lam: float = 0.1
    n_steps: int = 2
    ista_residual: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.step_size <= 0 or self.lam < 0:
            raise ValueError(f"ISTA needs step_size > 0 and lam >= 0; got step_size={self.step_size}, lam={self.lam}")
        if self.n_steps > 1000:
            raise ValueError(f"n_steps must be at most 1000, since every token takes them all; got {self.n_steps}")


class Crate(LanguageModel):
    """CRATE as in Bai & Ma (2024).

    | tensor | starts as |
    |---|---|
    | embeddings, MSSA projections | N(0, 0.02²) |
    | MSSA outputs | N(0, 0.02²/(2L)), bias 0 |
    | dictionaries Dᵀ | Kaiming-uniform with fan-in d |
    | LayerNorms | weight 1, bias 0 |
    """

    config_class = CrateConfig

    def __init__(self, config: CrateConfig):
        super().__init__(config, CrateBlock, lambda: nn.LayerNorm(config.width))
        for embedding in self.token_embedding, self.position_embedding:
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.attention.projection.weight, std=0.02)
            nn.init.normal_(block.attention.output.weight, std=0.02 / (2 * config.n_layers) ** 0.5)
            nn.init.zeros_(block.attention.output.bias)

    @classmethod
    def from_official(cls, path: str | Path) -> Self:
        """The model in a checkpoint of the official training code, in evaluation mode.

        Args:
            path: the file, holding `model` (a state dict, compiled, distributed or not) and `model_args`. Nothing is
                unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a checkpoint, or a key is missing, left over or misshapen, or a tensor is not of
                finite floating-point numbers; each is named.
        """
        path = Path(path)
        checkpoint = read_tensors(path)
        if not all(isinstance(checkpoint.get(entry), dict) for entry in ("model", "model_args")):
            held = ", ".join(map(str, list(checkpoint)[:5]))
            raise ValueError(
                f"{path} is no official checkpoint: expected the dicts model and model_args, got {held}, …; put a bare "
                'state dict beside its sizes: {"model": …, "model_args": {"n_layer": …, "n_head": …, "n_embd": …, '
                '"vocab_size": …, "block_size": …}}'
            )
        args = checkpoint["model_args"]
        names = dict(
            n_layers="n_layer", n_heads="n_head", width="n_embd", vocab_size="vocab_size", context="block_size"
        )
        if missing := [name for name in names.values() if name not in args]:
            raise ValueError(f"model_args of {path} lacks {', '.join(missing)}")
        try:
            config = CrateConfig(**{own: args[name] for own, name in names.items()})
        except ValueError as error:
            raise ValueError(f"model_args of {path}: {error}") from error
        weights = renamed(checkpoint["model"], _own_name, path)
        drop_tied_head(weights, path)
        return cls.with_weights(config, weights, path)

    @classmethod
    def from_huggingface(cls, path: str | Path) -> Self:
        """The model in a folder that `cratelab.to_huggingface` wrote, or `transformers` after it, in evaluation mode.

        Args:
            path: folder with config.json and model.safetensors, or the latter in several files and their index.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the configuration is not CRATE's, or the weights do not fit it, each misfit by name.
        """
        folder = Path(path)
        foreign, file = read_json(folder / "config.json"), folder / "model.safetensors"
        if foreign.get("model_type") != "crate":
            raise ValueError(f"{folder} describes a model of type {foreign.get('model_type')!r}; expected 'crate'")
        try:
            config = CrateConfig(**{own.name: foreign[own.name] for own in fields(CrateConfig) if own.name in foreign})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'} does not fit Crate: {error}") from error
        weights = renamed(read_weights(file), lambda key: key.removeprefix("model."), file)
        drop_tied_head(weights, file)
        return cls.with_weights(config, weights, file)


_OFFICIAL_NAMES = {
    "transformer.wte.": "token_embedding.",
    "transformer.wpe.": "position_embedding.",
    "transformer.ln_f.": "norm.",
    "transformer.h.": "blocks.",
    ".prenorm_1.": ".attention_norm.",
    ".attn.c_attn.": ".attention.projection.",
    ".attn.c_proj.": ".attention.output.",
    ".prenorm_2.": ".ista_norm.",
}


def _own_name(key: str) -> str:
    for official, own in _OFFICIAL_NAMES.items():
        key = key.replace(official, own)
    return key
