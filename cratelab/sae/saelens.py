"""Files that SAELens reads and writes too: what stands in cfg.json, and which tensors beside it."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from cratelab.sae.architectures import ARCHITECTURES, SaeConfig

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


def shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """What the file of such an auto-encoder holds."""
    m, d = config.n_features, config.d_in
    held = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    return held | {"threshold": (m,)} if ARCHITECTURES[config.kind].has_threshold else held


def facts(config: SaeConfig, dtype: torch.dtype, metadata: dict) -> dict:
    """What SAELens 6 wants to know, and in its `metadata` our own configuration and whatever else is to be said."""
    architecture = ARCHITECTURES[config.kind]
    return {
        "architecture": architecture.saelens,
        "d_in": config.d_in,
        "d_sae": config.n_features,
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "apply_b_dec_to_input": True,
        # without a version SAELens drops the rest
        "metadata": {"sae_lens_version": "6.0.0", "cratelab": asdict(config)} | metadata,
        "normalize_activations": "none",
        "reshape_activations": "none",
    } | ({"k": config.k} if architecture.has_k else {})


def read_config(file: Path, cfg: dict) -> SaeConfig:
    """The configuration that `cfg`, the content of `file`, describes.

    Raises:
        ValueError: it asks for what our auto-encoders do not do, describes none, or contradicts itself.
    """
    # BatchTopK is a JumpReLU to SAELens too; of two kinds with one name the last listed is the general one
    kinds = {each.saelens: kind for kind, each in ARCHITECTURES.items()}
    architecture, d_in, d_sae = (cfg.get(name) for name in ("architecture", "d_in", "d_sae"))
    if str(architecture) not in kinds:
        raise ValueError(f"{file} has the architecture {architecture!r}; this reads {' and '.join(kinds)}")
    of_k = {"k": cfg.get("k")} if ARCHITECTURES[kinds[architecture]].has_k else {}
    if changed := _not_honoured(cfg, of_k):
        raise ValueError(f"{file} asks for what this auto-encoder does not do: {', '.join(changed)}")
    if not all(type(size) is int and size > 0 for size in (d_in, d_sae)):
        raise ValueError(f"{file} must give d_in and d_sae as positive integers; got {d_in!r} and {d_sae!r}")
    metadata = cfg.get("metadata")
    ours = metadata.get("cratelab") if isinstance(metadata, dict) else None
    try:
        config = SaeConfig(**ours) if ours else SaeConfig(d_in, d_sae / d_in, kinds[architecture], **of_k)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} describes no auto-encoder: {error}") from error
    described = config.d_in, config.n_features, ARCHITECTURES[config.kind].saelens, of_k.get("k", config.k)
    if described != (d_in, d_sae, architecture, config.k):
        raise ValueError(f"{file} contradicts itself: {config} and {architecture}, d_in={d_in}, d_sae={d_sae}, {of_k}")
    return config


def _not_honoured(cfg: dict, of_k: dict) -> list[str]:
    """The settings that change what is computed in a way that we do not follow."""
    if "hook_z" in str(cfg.get("hook_name")) and "reshape_activations" not in cfg:
        cfg = cfg | {"reshape_activations": "hook_z"}  # as SAELens takes it
    values = _HONOURED | ({"k": [of_k["k"]], "rescale_acts_by_decoder_norm": [False, True]} if of_k else {})
    honoured = {name: [json.dumps(value) for value in each] for name, each in values.items()}  # 0 is not false
    return [
        f"{name}={value!r}"
        for name, value in cfg.items()
        if name not in _WITHOUT_EFFECT and json.dumps(value) not in honoured.get(name, [])
    ]
