"""Files that EleutherAI's sparsify writes for a hookpoint: what stands in cfg.json, and which tensors beside it."""

from pathlib import Path

from torch import Tensor

from cratelab.sae.architectures import SaeConfig

WEIGHTS = "sae.safetensors"

# Settings that change what is computed, and the value that we honour; the others say how it was trained.
_HONOURED = {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False}
_WITHOUT_EFFECT = {"d_in", "k", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk"}


def read_config(file: Path, cfg: dict) -> SaeConfig:
    """The configuration that `cfg`, the content of `file`, describes.

    Raises:
        ValueError: it describes no auto-encoder, or one that does what ours does not.
    """
    if changed := [
        f"{name}={value!r}"
        for name, value in cfg.items()
        if name not in _WITHOUT_EFFECT and (name not in _HONOURED or value != _HONOURED[name])
    ]:
        raise ValueError(f"{file} asks for what this auto-encoder does not do: {', '.join(changed)}")
    d_in, m = cfg.get("d_in"), cfg.get("num_latents")
    try:
        expansion = m / d_in if m else cfg.get("expansion_factor")
        return SaeConfig(d_in, expansion, "topk", k=cfg.get("k"))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} describes no auto-encoder: {error}") from error


def shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """What the file of such an auto-encoder holds."""
    m, d = config.n_features, config.d_in
    return {"encoder.weight": (m, d), "encoder.bias": (m,), "W_dec": (m, d), "b_dec": (d,)}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs by our names."""
    ours = {"W_enc": tensors["encoder.weight"].mT, "b_enc": tensors["encoder.bias"]}
    return ours | {name: tensors[name] for name in ("W_dec", "b_dec")}
