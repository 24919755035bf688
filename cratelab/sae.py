"""Sparse auto-encoders: a sparse code bolted on to the neurons of a trained model (chapter 10).

An auto-encoder learns m features of the neurons x of one layer, usually more than there are neurons: their code is
f = σ((x − b_dec) W_enc + b_enc), the reconstruction x̂ = f W_dec + b_dec. A layer of CRATE computes with its own code;
this one has to be spliced in, and x̂ ≠ x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.language_model import LanguageModel

KINDS = "relu", "batchtopk", "jumprelu"


@dataclass
class SaeConfig:
    """What an auto-encoder is, and how its code is kept sparse.

    Attributes:
        d_in: neurons that it reads.
        expansion: m / d_in, features per neuron; 16 in the paper.
        kind: "relu", trained with an L1 penalty (the paper's); "batchtopk", trained to have k active features a token
            on average, and used with a threshold; "jumprelu", a threshold for each feature, read from files only.
        l1: λ, the weight of the penalty Σ|f|; for "relu".
        k: active features a token; for "batchtopk".
    """

    d_in: int
    expansion: float = 16
    kind: str = "relu"
    l1: float = 8e-5
    k: int = 32

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.d_in < 1 or self.n_features < 1 or not self.l1 >= 0:
            raise ValueError(
                "an auto-encoder needs d_in and features of at least 1, and l1 >= 0; got "
                f"d_in={self.d_in}, {self.n_features} features, l1={self.l1}"
            )
        if self.kind == "batchtopk" and not 1 <= self.k <= self.n_features:
            raise ValueError(f"k must be 1 to {self.n_features}, the number of features; got {self.k}")

    @property
    def n_features(self) -> int:
        """m."""
        return round(self.d_in * self.expansion)


class Sae(nn.Module):
    """A sparse auto-encoder; parameters are named as in SAELens.

    | tensor | shape | starts as |
    |---|---|---|
    | W_dec | (m, d_in) | random unit rows |
    | W_enc | (d_in, m) | their transpose |
    | b_enc, b_dec | (m,), (d_in,) | 0 |
    | threshold, a buffer | (m,) | 0: below it a feature is off; for "relu" it stays there |
    """

    def __init__(self, config: SaeConfig):
        super().__init__()
        self.config = config
        rows = F.normalize(torch.randn(config.n_features, config.d_in), dim=1)
        self.W_enc = nn.Parameter(rows.mT.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("threshold", torch.zeros(config.n_features))

    def encode(self, x: Tensor) -> Tensor:
        """Neurons (..., d_in) to the code (..., m), at least 0.

        Raises:
            ValueError: `x` has another width.
        """
        pre = self.pre_activations(x)
        return F.relu(pre) if self.config.kind == "relu" else F.relu(pre) * (pre > self.threshold)

    def pre_activations(self, x: Tensor) -> Tensor:
        """(x − b_dec) W_enc + b_enc, (..., d_in) to (..., m)."""
        if x.shape[-1] != self.config.d_in:
            raise ValueError(f"the auto-encoder reads {self.config.d_in} neurons; got a tensor {tuple(x.shape)}")
        return F.linear(x - self.b_dec, self.W_enc.mT, self.b_enc)

    def decode(self, code: Tensor) -> Tensor:
        """The code (..., m) to neurons (..., d_in)."""
        return code @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of neurons (..., d_in)."""
        return self.decode(self.encode(x))


@contextmanager
def splice(model: LanguageModel, saes: dict[int, Sae], error_term: bool = False) -> Iterator[None]:
    """Inside, reconstructions stand in place of neurons, and `block.neurons` sees the auto-encoder's code (b, n, m).

    Whatever reads or edits `model.blocks[layer].neurons` then reads or edits features: `collect_records` (which needs
    equally many in all layers), `match_concepts`, hooks. Hooks set before see the neurons, as before.

    Args:
        model: any model whose blocks have a `neurons` site; `generate` works inside as outside.
        saes: of each layer, counted from 0, to be spliced, its auto-encoder, on the device of `model`.
        error_term: add what the reconstruction lacks: x' = Dec(f') + (x − Dec(f)), f' the code after any edit, so that
            to edit nothing changes nothing, to rounding.

    Raises:
        ValueError: there is no such layer, or its neurons are not as many as the auto-encoder reads.
    """
    width = model.config.expansion * model.config.width
    for layer, sae in saes.items():
        if not 0 <= layer < len(model.blocks):
            raise ValueError(f"the model has the layers 0 to {len(model.blocks) - 1}; got {layer}")
        if sae.config.d_in != width:
            raise ValueError(f"layer {layer} has {width} neurons, its auto-encoder reads {sae.config.d_in}")
    sites = {layer: model.blocks[layer].neurons for layer in saes}
    try:
        for layer, sae in saes.items():
            model.blocks[layer].neurons = _Spliced(sae, sites[layer], error_term)
        yield
    finally:
        for layer, site in sites.items():
            model.blocks[layer].neurons = site


class _Spliced(nn.Identity):
    """An identity on the code, so that hooks see that, within a call that takes and returns neurons."""

    def __init__(self, sae: Sae, site: nn.Module, error_term: bool):
        super().__init__()
        self.site, self.error_term = site, error_term
        self.encode, self.decode = sae.encode, sae.decode  # not `sae` itself: its weights are none of the model's

    def __call__(self, x: Tensor) -> Tensor:
        x = self.site(x)
        code = self.encode(x)
        error = x - self.decode(code) if self.error_term else 0
        return self.decode(super().__call__(code)) + error
