"""GPT-2, the model CRATE is compared with: the same trunk, attention and an MLP in the block (chapter 5).

As in the comparison of Bai & Ma (2024) it has no biases and ReLU by default, so that its MLP activations are
non-negative "neurons" like CRATE's codes; with biases and `gelu_new` it is OpenAI's GPT-2 and takes its weights.
"""

from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cratelab.language_model import LanguageModel, LanguageModelConfig
from cratelab.mssa import attend
from cratelab.storage import read_json
from cratelab.weights import drop_tied_head, index_of, read_weights, renamed

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh")}


@dataclass
class Gpt2Config(LanguageModelConfig):
    """`LanguageModelConfig` and what differs between the paper's GPT-2 and OpenAI's.

    Attributes:
        activation: "relu" (the paper), "gelu" or "gelu_new" (OpenAI's).
        bias: biases in the matrices and LayerNorms; the paper's has none, OpenAI's has.
        norm_eps: added to the variance in LayerNorm.
        top_k: neurons of a token that may be active, the others are set to 0; GPT-2 has no such limit (chapter 9).
    """

    activation: str = "relu"
    bias: bool = False
    norm_eps: float = 1e-5
    top_k: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive; got {self.norm_eps}")
        k, most = self.top_k, self.n_neurons
        if k is not None:
            if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= most:
                raise ValueError(f"top_k must be 1 to {most}, or None; got {k!r}")
            self.top_k = int(k)


class Attention(nn.Module):
    """Causal multi-head attention with separate queries, keys and values; (b, n, d) to (b, n, d)."""

    cache_tensors = 2

    def __init__(self, config: Gpt2Config):
        super().__init__()
        self.n_heads, self.span = config.n_heads, config.span
        self.projection = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, cache: Tensor | None = None, position: int = 0) -> Tensor:
        """Attend over `x` (b, n, d), or over the cache (2, b, k, context, p) extended at `position` by `x`."""
        projected = rearrange(self.projection(x), "b n (three k p) -> three b k n p", three=3, k=self.n_heads)
        query, key_value = projected[0], projected[1:]
        if cache is not None:
            cache[:, :, :, position : position + x.shape[1]] = key_value
            key_value = cache[:, :, :, : position + x.shape[1]]
        attended = attend(query, *key_value, position == 0, span=self.span)
        return self.output(rearrange(attended, "b k n p -> b n (k p)"))


class Gpt2Block(nn.Module):
    """Attention, then an MLP whose activations pass through `neurons`; (b, n, d) to (b, n, d)."""

    def __init__(self, config: Gpt2Config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.mlp_in = nn.Linear(config.width, config.n_neurons, bias=config.bias)
        self.activation, self.top_k = ACTIVATIONS[config.activation], config.top_k
        self.neurons = nn.Identity()
        self.mlp_out = nn.Linear(config.n_neurons, config.width, bias=config.bias)

    def forward(self, x: Tensor, cache: Tensor | None = None, position: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache, position)
        a = self.activation(self.mlp_in(self.mlp_norm(x)))
        if self.top_k:
            strongest, which = a.topk(self.top_k, -1)
            a = torch.zeros_like(a).scatter(-1, which, strongest)
        return x + self.mlp_out(self.neurons(a))


class Gpt2(LanguageModel):
    """GPT-2 as in Bai & Ma (2024), or OpenAI's.

    | tensor | starts as |
    |---|---|
    | embeddings, attention projections, first MLP matrices | N(0, 0.02²) |
    | attention outputs, second MLP matrices | N(0, 0.02²/(2L)) |
    | LayerNorms | weight 1 |
    | biases, where there are any | 0 |
    """

    config_class = Gpt2Config

    def __init__(self, config: Gpt2Config):
        super().__init__(config, Gpt2Block, partial(nn.LayerNorm, config.width, eps=config.norm_eps, bias=config.bias))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for matrix in block.attention.output, block.mlp_out:
                nn.init.normal_(matrix.weight, std=0.02 / (2 * config.n_layers) ** 0.5)

    @classmethod
    def from_huggingface(cls, path: str | Path) -> Self:
        """The model in a folder of Hugging Face `gpt2` weights, in evaluation mode.

        Args:
            path: folder with config.json and model.safetensors or pytorch_model.bin, whole or in several files
                with their index. Nothing is unpickled.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the configuration is not GPT-2's, or a key is missing, left over or misshapen, or a tensor is
                not of finite floating-point numbers; each is named.
        """
        folder = Path(path)
        config = _config_from_huggingface(folder / "config.json")
        files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
        file = next((file for file in files if file.exists() or index_of(file).exists()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
        weights = renamed(read_weights(file), _own_name, file)
        for name in weights:
            if name.endswith(_STORED_AS_IN_OUT) and weights[name].ndim == 2:
                weights[name] = weights[name].mT
        drop_tied_head(weights, file)
        if not config.bias:
            biases = {name: weights.pop(name) for name in list(weights) if name.endswith(".bias")}
            if any(bias.any() for bias in biases.values()):  # trained since they were written as 0
                config, weights = replace(config, bias=True), weights | biases
        return cls.with_weights(config, weights, file)

    def huggingface_config(self) -> dict:
        """The settings with which `transformers.GPT2Config` describes this model.

        Raises:
            ValueError: the model has a `span` or `top_k`, which are not in Hugging Face's `gpt2`.
        """
        c = self.config
        if c.span is not None or c.top_k is not None:
            raise ValueError(f"Hugging Face's gpt2 has neither span nor top_k; got span={c.span}, top_k={c.top_k}")
        return {
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_embd": c.width,
            "n_inner": c.n_neurons,
            "vocab_size": c.vocab_size,
            "n_positions": c.context,
            "activation_function": c.activation,
            "layer_norm_epsilon": c.norm_eps,
            "bias": c.bias,  # read by `from_huggingface` alone
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def huggingface_weights(self) -> dict[str, Tensor]:
        """The weights under the names of Hugging Face's `gpt2`, with biases of 0 where this model has none."""
        weights = {}
        for name, tensor in self.state_dict().items():
            weights[f"transformer.{_foreign_name(name)}"] = tensor.mT if name.endswith(_STORED_AS_IN_OUT) else tensor
        for name in [name for name in weights if ".h." in name or "ln_f" in name]:
            bias = f"{name.rpartition('.')[0]}.bias"
            weights.setdefault(bias, weights[name].new_zeros(weights[name].shape[-1]))
        return weights


def _config_from_huggingface(file: Path) -> Gpt2Config:
    foreign = read_json(file)
    if foreign.get("model_type") != "gpt2":
        raise ValueError(f"{file} describes a model of type {foreign.get('model_type')!r}; expected 'gpt2'")
    if missing := [name for name in ("n_layer", "n_head", "n_embd", "vocab_size") if name not in foreign]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    unsupported = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    if changed := [name for name, usual in unsupported.items() if foreign.get(name, usual) is not usual]:
        raise ValueError(f"{file} asks for what this GPT-2 does not do: {', '.join(changed)}")
    hidden = foreign.get("n_inner")
    try:
        config = Gpt2Config(
            n_layers=foreign["n_layer"],
            n_heads=foreign["n_head"],
            width=foreign["n_embd"],
            vocab_size=foreign["vocab_size"],
            context=foreign.get("n_positions", 1024),
            activation=foreign.get("activation_function", "gelu_new"),
            bias=foreign.get("bias", True),
            norm_eps=foreign.get("layer_norm_epsilon", 1e-5),
        )
        if hidden is None:
            return config
        if type(hidden) is not int or hidden % config.width:
            raise ValueError(f"n_inner must be a multiple of n_embd, or null; got n_inner={hidden!r}")
        return replace(config, expansion=hidden // config.width)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_HUGGINGFACE_NAMES = {
    "wte.": "token_embedding.",
    "wpe.": "position_embedding.",
    "ln_f.": "norm.",
    "ln_1.": "attention_norm.",
    "ln_2.": "mlp_norm.",
    "attn.c_attn.": "attention.projection.",
    "attn.c_proj.": "attention.output.",
    "mlp.c_fc.": "mlp_in.",
    "mlp.c_proj.": "mlp_out.",
}


_STORED_AS_IN_OUT = "attention.projection.weight", "attention.output.weight", "mlp_in.weight", "mlp_out.weight"


def _own_name(key: str) -> str | None:
    key = key.removeprefix("transformer.")
    if key.endswith((".attn.bias", ".attn.masked_bias")):
        return None  # causal masks that old files carry as buffers
    if key.startswith("h."):
        key = "blocks." + key.removeprefix("h.")
    for foreign, own in _HUGGINGFACE_NAMES.items():
        key = key.replace(foreign, own)
    return key


def _foreign_name(key: str) -> str:
    for foreign, own in sorted(_HUGGINGFACE_NAMES.items(), key=lambda names: -len(names[1])):  # "norm." ends others
        key = key.replace(own, foreign)
    return key.replace("blocks.", "h.")
