"""The auto-encoder, and its files, which SAELens reads too.

An auto-encoder learns m features of the neurons x of one layer, usually more than there are neurons: their code is
f = σ((x − b_dec) W_enc + b_enc), the reconstruction x̂ = f W_dec + b_dec (eq-10-1). A layer of CRATE
computes with its own code; this one has to be spliced in, and x̂ ≠ x.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.storage import read_json, read_tensors, replacing, tensor_shapes, write_json, write_tensors

KINDS = {"relu": "standard", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}  # and what SAELens calls them in use


@dataclass
class SaeConfig:
    """What an auto-encoder is, and how its code is kept sparse.

    Attributes:
        d_in: neurons that it reads.
        expansion: m / d_in, features per neuron; 16 in the paper.
        kind: "relu", trained with an L1 penalty (the paper's); "batchtopk", trained to have k active features a token
            on average, and used with a threshold; "jumprelu", a threshold for each feature, read from files only.
        l1: λ, the weight of the penalty Σ|f|; for "relu". The paper's 8e-5 goes with errors averaged over 512 neurons
            and divided by ‖x‖; ours are summed and divided by ‖x‖², so that 1e-2 stands for about the same.
        k: active features a token; for "batchtopk". In use the threshold decides, the same for all features: the
            largest value that training dropped, averaged over its batches with a rate of 0.01.

    Raises:
        ValueError: a value is of another type, not finite or out of range.
    """

    d_in: int
    expansion: float = 16
    kind: str = "relu"
    l1: float = 1e-2
    k: int = 32

    def __post_init__(self):
        if self.kind not in list(KINDS):
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        for name, kind in ("d_in", int), ("k", int), ("expansion", int | float), ("l1", int | float):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not abs(value) < 2**31:
                raise ValueError(f"{name} must be a number below 2**31, and d_in and k whole; got {name}={value!r}")
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
        pre = self.pre_activations(x)
        return F.relu(pre) if self.config.kind == "relu" else F.relu(pre) * (pre > self.threshold)

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
        folder, config = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        about = {"sae_lens_version": "6.0.0", "cratelab": asdict(config)} | metadata  # without a version it is dropped
        facts = dict(architecture=KINDS[config.kind], d_in=config.d_in, d_sae=config.n_features, device="cpu")
        facts |= dict(dtype=str(self.W_enc.dtype).removeprefix("torch."), apply_b_dec_to_input=True, metadata=about)
        facts |= dict(normalize_activations="none", reshape_activations="none")
        tensors = {name: self.state_dict()[name] for name in _tensor_shapes(config)}
        with replacing(folder / "cfg.json") as cfg:  # both are written before either is replaced
            write_json(cfg, facts)
            write_tensors(folder / "sae_weights.safetensors", tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The auto-encoder in a folder that `save` or SAELens wrote, in float32 on the CPU.

        Raises:
            FileNotFoundError: `folder` lacks cfg.json or sae_weights.safetensors.
            ValueError: a file is damaged, the two do not fit, or they describe what this auto-encoder does not do.
        """
        folder = Path(folder)
        cfg, file = read_json(folder / "cfg.json"), folder / "sae_weights.safetensors"
        config = _read_sae_config(folder / "cfg.json", cfg)
        found, expected = tensor_shapes(file), _tensor_shapes(config)
        if found != expected:  # before anything of these sizes is made
            raise ValueError(f"{file} holds {found}; by {folder / 'cfg.json'} it should hold {expected}")
        weights = read_tensors(file)
        if bad := [f"{name} {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in DTYPES.values()]:
            raise ValueError(f"{file} must hold numbers of {', '.join(DTYPES)}; got {', '.join(bad)}")
        sae = cls(config)
        sae.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
        if not cfg.get("apply_b_dec_to_input", True):
            sae.b_enc.data += sae.b_dec.data @ sae.W_enc.data  # what we subtract is added beforehand
        if bad := [name for name, tensor in sae.state_dict().items() if not tensor.isfinite().all()]:
            raise ValueError(f"{file} is damaged: not all numbers in {', '.join(bad)} are finite")
        return sae


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Settings of SAELens, all that it has had, that change what is computed, and the values that we honour.
_HONOURED = {
    "dtype": [*DTYPES, *map(str, DTYPES.values())],
    "apply_b_dec_to_input": [True, False],
    "normalize_activations": ["none", None, False],
    "reshape_activations": ["none"],
    "activation_fn": ["relu"],
    "activation_fn_str": ["relu"],
    "activation_fn_kwargs": [{}, None],
    "finetuning_scaling_factor": [False, None],
    "rescale_acts_by_decoder_norm": [False],
    "use_error_term": [False],
}

# Those that do not: where an auto-encoder belongs, on what text and how it was trained.
_WITHOUT_EFFECT = {
    *("architecture", "d_in", "d_sae", "metadata", "device", "sae_lens_version", "sae_lens_training_version"),
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "model_kwargs", "neuronpedia_id"),
    *("hook_name", "hook_layer", "hook_head_index", "hook_point", "hook_point_layer", "hook_point_head_index"),
    *("context_size", "prepend_bos", "seqpos_slice", "exclude_special_tokens", "training_tokens"),
    *("dataset_path", "dataset_trust_remote_code", "l1_coefficient", "l1_warm_up_steps", "l0_coefficient"),
    *("l0_warm_up_steps", "lp_norm", "use_ghost_grads", "mse_loss_normalization", "noise_scale"),
    *("normalize_sae_decoder", "decoder_init_norm", "decoder_orthogonal_init", "decoder_heuristic_init"),
    *("decoder_heuristic_init_norm", "init_encoder_as_decoder_transpose", "scale_sparsity_penalty_by_decoder_norm"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth"),
}


def _tensor_shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """What the file of such an auto-encoder holds."""
    m, d = config.n_features, config.d_in
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    return shapes if config.kind == "relu" else shapes | {"threshold": (m,)}


def _read_sae_config(file: Path, cfg: dict) -> SaeConfig:
    kinds = {"standard": "relu", "jumprelu": "jumprelu"}
    architecture, d_in, d_sae = (cfg.get(name) for name in ("architecture", "d_in", "d_sae"))
    if str(architecture) not in kinds:
        raise ValueError(f"{file} has the architecture {architecture!r}; this reads {' and '.join(kinds)}")
    if "hook_z" in str(cfg.get("hook_name")) and "reshape_activations" not in cfg:
        cfg = cfg | {"reshape_activations": "hook_z"}  # as SAELens takes it
    honoured = {name: [json.dumps(value) for value in values] for name, values in _HONOURED.items()}  # 0 is not false
    if changed := [
        f"{name}={value!r}"
        for name, value in cfg.items()
        if name not in _WITHOUT_EFFECT and json.dumps(value) not in honoured.get(name, [])
    ]:
        raise ValueError(f"{file} asks for what this auto-encoder does not do: {', '.join(changed)}")
    if not all(type(size) is int and size > 0 for size in (d_in, d_sae)):
        raise ValueError(f"{file} must give d_in and d_sae as positive integers; got {d_in!r} and {d_sae!r}")
    metadata = cfg.get("metadata")
    ours = metadata.get("cratelab") if isinstance(metadata, dict) else None
    try:
        config = SaeConfig(**ours) if ours else SaeConfig(d_in, d_sae / d_in, kinds[architecture])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} describes no auto-encoder: {error}") from error
    if (config.d_in, config.n_features, KINDS[config.kind]) != (d_in, d_sae, architecture):
        raise ValueError(f"{file} contradicts itself: {config} and {architecture}, d_in={d_in}, d_sae={d_sae}")
    return config
