"""Weights from files: put under our names, and refused where they do not fit, every misfit by name."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cratelab.storage import read_json, read_tensors


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of `file` or, where `transformers` has divided them, of the files beside it that its index names.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: a file is damaged, or the index names another folder's, or other tensors than the files hold.
    """
    index = index_of(file)
    if file.exists() or not index.is_file():
        return read_tensors(file)
    place = read_json(index).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(part, str) and _beside(part) for part in place.values()):
        raise ValueError(
            f"{index}: weight_map must say of each tensor in which file beside it that is; got {str(place)[:100]}"
        )
    parts = {part: read_tensors(file.with_name(part)) for part in sorted({*place.values()})}
    held = {(name, part): tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    if wrong := held.keys() ^ place.items():
        listed = ", ".join(sorted({str(name) for name, _ in wrong}))
        raise ValueError(
            f"{index} names other tensors than its files hold, which differ in {listed}: copy all of them again"
        )
    return {name: tensor for (name, _), tensor in held.items()}


def index_of(file: Path) -> Path:
    """The file that says which files hold the tensors of `file`, where it was divided."""
    return file.with_name(f"{file.name}.index.json")


def _beside(name: str) -> bool:
    return name not in ("", ".", "..") and not {*name} & {"/", "\\", "\0"}


def renamed(weights: Mapping, rename: Callable[[str], str | None], source: str | Path) -> dict[str, Tensor]:
    """Weights from elsewhere under our names; those of which `rename` makes None are left out.

    The prefixes of PyTorch's DDP and compiled modules, `module` and `_orig_mod`, are gone before `rename` sees a name.

    Raises:
        ValueError: a name is no text, two become one, or a tensor holds something else than finite floating-point
            numbers.
    """
    own = {}
    for key, tensor in weights.items():
        if not isinstance(key, str):
            raise ValueError(f"{source}: a tensor must be named by a text; got {key!r}")
        name = rename(".".join(part for part in key.split(".") if part not in ("module", "_orig_mod")))
        if name in own:
            raise ValueError(f"{source} holds {name} twice, once as {key}")
        if name is not None:
            own[name] = tensor
    check_numbers(own, source)
    return own


_PRECISIONS = torch.float16, torch.bfloat16, torch.float32, torch.float64  # those of 8 bits come with factors beside


def check_numbers(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse what is no plain tensor of finite floating-point numbers, finite also in the default dtype.

    Raises:
        ValueError: naming `source` and each tensor.
    """

    def problem(tensor: object) -> str | None:
        if not isinstance(tensor, Tensor):
            return f"is {type(tensor).__name__}, expected a tensor"
        if tensor.dtype not in _PRECISIONS:
            return f"is {tensor.dtype}, expected float16, bfloat16, float32 or float64"
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            return "is sparse, nested or without its numbers, expected a plain tensor"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"is {tuple(tensor.shape)}, more than the file holds"
        wrong = tensor.numel() - int(tensor.to(torch.get_default_dtype()).isfinite().sum())
        return f"holds {wrong} numbers that are not finite" if wrong else None

    problems = [f"{name} {said}" for name, tensor in weights.items() if (said := problem(tensor))]
    if problems:
        raise ValueError(f"{source} holds no usable weights:{_listed(problems)}")


def drop_tied_head(weights: dict[str, Tensor], source: Path) -> None:
    """Remove lm_head.weight, which files from elsewhere hold beside the embedding that it is, or instead of it.

    Raises:
        ValueError: it is not the embedding.
    """
    head = weights.pop("lm_head.weight", None)
    if head is None:
        return
    embedding = weights.setdefault("token_embedding.weight", head)
    if head.shape != embedding.shape or not head.double().equal(embedding.double()):
        raise ValueError(
            f"{source}: lm_head.weight differs from the token embedding (wte.weight), but the two are tied"
        )


def check_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], config: object) -> None:
    """Raises ValueError unless `weights` have the names and shapes of `own`, those of a model of `config`."""
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in weights]
    problems += [f"unexpected {name} {tuple(weights[name].shape)}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"the weights do not fit {config}:{_listed(problems)}")


def _listed(problems: list[str], most: int = 50) -> str:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {line}" for line in problems[:most] + more)
