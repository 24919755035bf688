"""What the command line checks before any work: folders, and what an earlier command has left."""

import os
import tempfile
from pathlib import Path
from typing import Literal, get_args, get_origin

from cratelab.run_directory import read_metrics
from cratelab.storage import read_json


def check_different(option: str, names: tuple[str, ...]) -> None:
    """Raises ValueError unless there are names, all different."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{option} must name at least one, and none twice; got {' '.join(names) or 'none'}")


def check_context(context: int | None, characters: int) -> None:
    """Raises ValueError if no text fills a window: a character is four bytes at most, a token at least one."""
    if context is not None and context > 4 * characters:
        raise ValueError(f"--context must be at most four times --characters, {characters}; got {context}")


def check_folder(option: str, folder: Path) -> None:
    """Raises OSError unless files can be made in `folder`, which may be missing."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option} must be a folder; {folder} is a file")
    check_writable(option, folder / "run.json")


def check_writable(option: str, file: Path) -> None:
    """Raises OSError unless a file can be made where `file` shall be, in folders that may still be missing."""
    folder = file.parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{option}: nothing can be written into {folder}: {error}") from error


def check_alone(command: str) -> None:
    """Raises ValueError if the command, which is work for one process, was started in several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"{command} is work for one process: start it without torchrun and accelerate launch")


def check_results(file: Path, key: str) -> None:
    """Raises OSError or ValueError unless results, which hold `key`, can be written to `file`: anew, or over others."""
    if file.is_dir():
        raise IsADirectoryError(f"--out must be a file to write; {file} is a folder")
    if file.is_file() and key not in read_json(file):
        raise ValueError(f"--out: {file} is there and holds something else than such results: choose another name")
    check_writable("--out", file)


def fits(value: object, hint: object) -> bool:
    """Whether a value from JSON is of the type that an option has."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if options := get_args(hint):
        return any(fits(value, option) for option in options)
    return type(value) is hint or (hint is float and type(value) is int)


def model_folder(folder: Path) -> Path:
    """Where the model is in what a user gave: a run's own, the folder itself, or an official checkpoint's file.

    Raises:
        OSError: it is in neither; the message says what the folder holds instead.
    """
    if folder.is_file() and folder.suffix == ".pt":
        return folder
    for each in folder / "model", folder:
        if (each / "config.json").is_file():
            return each
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise NotADirectoryError(
            f"{folder} {what}: give the folder of a run or of a model, or an official checkpoint, *.pt"
        )
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it{instead(folder)}")
    run = read_json(folder / "run.json")
    if "sae" in run:
        raise FileNotFoundError(
            f"{folder} holds a run of another kind, of auto-encoders: give the model that they were trained on"
        )
    recipe = run.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else "?"
    how = f"cratelab train --resume {folder}" if run.get("command") else "the call of `train` that began it"
    raise FileNotFoundError(
        f"{folder} holds a run that has not ended, and no model yet: go on with {how}; "
        f"{len(read_metrics(folder))} of {steps} steps are done"
    )


def instead(folder: Path) -> str:
    """What a folder holds that was taken for a run or a model."""
    if not folder.is_dir():
        return "; it is a file" if folder.exists() else "; it does not exist"
    if runs := sorted(file.parent for file in folder.glob("*/run.json")):
        return f"; it holds runs: give one of them, such as {runs[0]}"
    if any((folder / name).is_file() for name in ("manifest.json", "train/manifest.json")):
        return "; it holds the tokens of a corpus"
    if any((folder / name).is_file() for name in ("cfg.json", "layer-0/cfg.json")):
        return "; it holds an auto-encoder: give the model that it was trained on"
    return ""
