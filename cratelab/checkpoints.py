"""A checkpoint: what a training needs to go on after a step, in a folder that is whole if it is there.

    config.json             the model, as `LanguageModel.save` writes it, so that `cratelab.load` reads a checkpoint
    model.safetensors
    optimizer.safetensors   AdamW's moments
    checksums.json          of which run and step it is, and the SHA-256 of each file beside it: they belong together

However the weights are spread over GPUs, the files hold whole tensors under the model's own names.
"""

from contextlib import suppress
from pathlib import Path

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cratelab.language_model import LanguageModel
from cratelab.storage import digest_of_file, read_json, read_tensors, replacing, write_json, write_tensors

_SUMS = "checksums.json"
_FILES = "config.json", "model.safetensors", "optimizer.safetensors"
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process's CPU


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights, on the main process; all processes have to call it."""
    return get_model_state_dict(model, options=_GATHERED)


def whole_state(model: nn.Module, optimizer: AcceleratedOptimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and AdamW's moments, on the main process; all processes have to call it."""
    state = get_optimizer_state_dict(model, optimizer.optimizer, options=_GATHERED)
    return whole_weights(model), _moments(state)


def write_checkpoint(
    folder: Path, model: LanguageModel, weights: dict[str, Tensor], moments: dict[str, Tensor], **facts
) -> None:
    """Write a checkpoint; what is told of it goes beside the sums.

    Args:
        folder: which does not exist.
        model: whose configuration it is.
        weights: its weights now.
        moments: of its optimizer.
        facts: run and step, by which `is_checkpoint` knows it, and whatever else.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(folder) as part:
        model.save(part, weights)
        write_tensors(part / "optimizer.safetensors", moments)
        write_json(part / _SUMS, facts | {"sha256": {name: digest_of_file(part / name) for name in _FILES}})


def load_state(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """Give weights and moments of a checkpoint to the model and its optimizer.

    Raises:
        ValueError: they are of another optimizer.
    """
    weights = read_tensors(folder / "model.safetensors")
    moments = read_tensors(folder / "optimizer.safetensors")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    state = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
    if _moments(state).keys() != moments.keys():
        raise ValueError(f"{folder / 'optimizer.safetensors'} is not the state of this optimizer")
    for parameter, held in state["state"].items():
        held.update({name: moments[f"{parameter}.{name}"] for name in held})
    set_optimizer_state_dict(model, optimizer.optimizer, state, options=options)


def check_sums(folder: Path) -> dict:
    """What was told of a checkpoint whose files are those that were written.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or not of this checkpoint.
    """
    told = read_json(folder / _SUMS)
    for name in _FILES:
        try:
            expected = told["sha256"][name]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / _SUMS} is damaged") from error
        if digest_of_file(folder / name) != expected:
            raise ValueError(f"{folder / name} cannot be read as it was written: its SHA-256 differs")
    return told


def is_checkpoint(folder: Path, run: str, step: int) -> bool:
    """Whether this run wrote it after this step, though it may have been damaged since."""
    if not folder.is_dir():
        return False
    try:
        told = read_json(folder / _SUMS)
    except (ValueError, OSError):
        return any((folder / name).exists() for name in (_SUMS, "optimizer.safetensors"))
    return (told.get("run"), told.get("step")) == (run, step)


def remove_checkpoint(folder: Path) -> None:
    """What the program wrote; a folder that holds other files stays."""
    with suppress(OSError):
        for name in *_FILES, _SUMS:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _moments(state: dict) -> dict[str, Tensor]:
    """AdamW's tensors of each parameter under one name each; none of what is gathered on another process."""
    return {f"{parameter}.{name}": held[name] for parameter, held in state.get("state", {}).items() for name in held}
