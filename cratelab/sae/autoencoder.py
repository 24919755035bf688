"""The auto-encoder: encoder, decoder, files.

An auto-encoder learns m features of the neurons x of one layer, usually more than there are neurons: their code is
f = σ((x − b_dec) W_enc + b_enc), the reconstruction x̂ = f W_dec + b_dec (eq-10-1). A layer of CRATE
computes with its own code; this one has to be spliced in, and x̂ ≠ x.
"""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.sae import saelens, sparsify
from cratelab.sae.architectures import ARCHITECTURES, SaeConfig
from cratelab.storage import read_json, read_tensors, replacing, tensor_shapes, write_json, write_tensors

FILES = CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


class Sae(nn.Module):
    """A sparse auto-encoder; parameters are named as in SAELens.

    | tensor | shape | starts as |
    |---|---|---|
    | W_dec | (m, d_in) | random unit rows |
    | W_enc | (d_in, m) | their transpose |
    | b_enc, b_dec | (m,), (d_in,) | 0 |
    | threshold, a buffer | (m,) | 0: below it a feature is off; where there is none it stays there |
    """

    def __init__(self, config: SaeConfig):
        super().__init__()
        self.config, self.architecture = config, ARCHITECTURES[config.kind](config)
        rows = F.normalize(torch.randn(config.n_features, config.d_in), dim=1)
        self.W_enc = nn.Parameter(rows.mT.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("threshold", torch.zeros(config.n_features))

    def encode(self, x: Tensor) -> Tensor:
        """Neurons (..., d_in) of any dtype to the code (..., m), at least 0.

        Raises:
            ValueError: `x` has another width.
        """
        return self.architecture.code(self.pre_activations(x), self.threshold)

    def pre_activations(self, x: Tensor) -> Tensor:
        """(x − b_dec) W_enc + b_enc, (..., d_in) to (..., m)."""
        if x.shape[-1] != self.config.d_in:
            raise ValueError(f"the auto-encoder reads {self.config.d_in} neurons; got a tensor {tuple(x.shape)}")
        return F.linear(x.to(self.b_dec.dtype) - self.b_dec, self.W_enc.mT, self.b_enc)

    def decode(self, code: Tensor) -> Tensor:
        """The code (..., m) to neurons (..., d_in)."""
        return code.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of neurons (..., d_in)."""
        return self.decode(self.encode(x))

    def save(self, folder: str | Path, **metadata) -> None:
        """Write sae_weights.safetensors and cfg.json into `folder`, each whole or not at all, as SAELens 6 reads them.

        Args:
            folder: made if need be.
            metadata: what else to say of it, such as model_name and hook_name.

        Raises:
            OSError: a file cannot be written, such as on a full disk.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: self.state_dict()[name] for name in saelens.shapes(self.config)}
        with replacing(folder / CFG) as cfg:  # both are written before either is replaced
            write_json(cfg, saelens.facts(self.config, self.W_enc.dtype, metadata))
            write_tensors(folder / WEIGHTS, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The auto-encoder in a folder that `save` or SAELens wrote, in float32 on the CPU.

        Raises:
            FileNotFoundError: `folder` lacks cfg.json or sae_weights.safetensors.
            ValueError: a file is damaged, the two do not fit, or they describe what this auto-encoder does not do.
        """
        folder = Path(folder)
        cfg, file = read_json(folder / CFG), folder / WEIGHTS
        config = saelens.read_config(folder / CFG, cfg)
        weights = _read(file, saelens.shapes(config))
        if not cfg.get("apply_b_dec_to_input", True):
            weights["b_enc"] += weights["b_dec"] @ weights["W_enc"]  # what we subtract is added beforehand
        if cfg.get("rescale_acts_by_decoder_norm"):
            # SAELens ranks features, and gives them out, times these; one of length 0 says nothing in any case
            lengths = weights["W_dec"].norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            weights["W_enc"] *= lengths
            weights["b_enc"] *= lengths
            weights["W_dec"] /= lengths[:, None]
        return cls._of(config, weights, file)

    @classmethod
    def from_sparsify(cls, folder: str | Path) -> Self:
        """The auto-encoder in a hookpoint's folder that EleutherAI's sparsify wrote, in float32 on the CPU.

        Raises:
            FileNotFoundError: `folder` lacks cfg.json or sae.safetensors.
            ValueError: as `load`.
        """
        folder = Path(folder)
        file = folder / sparsify.WEIGHTS
        config = sparsify.read_config(folder / CFG, read_json(folder / CFG))
        return cls._of(config, sparsify.renamed(_read(file, sparsify.shapes(config))), file)

    @classmethod
    def _of(cls, config: SaeConfig, weights: dict[str, Tensor], file: Path) -> Self:
        sae = cls(config)
        sae.load_state_dict(weights, strict=False)
        if bad := [name for name, tensor in sae.state_dict().items() if not tensor.isfinite().all()]:
            raise ValueError(f"{file} is damaged: not all numbers in {', '.join(bad)} are finite")
        return sae


def _read(file: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What `file` holds, in float32."""
    found, dtypes = tensor_shapes(file), saelens.DTYPES
    if found != expected:  # before anything of these sizes is made
        raise ValueError(f"{file} holds {found}; by {file.with_name(CFG)} it should hold {expected}")
    weights = read_tensors(file)
    if bad := [f"{name} {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in dtypes.values()]:
        raise ValueError(f"{file} must hold numbers of {', '.join(dtypes)}; got {', '.join(bad)}")
    return {name: tensor.float() for name, tensor in weights.items()}
