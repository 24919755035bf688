"""Files: replaced whole or not at all, read with errors that name them, and one process at a time where it matters.

Nothing is ever unpickled. JSON holds no NaN: what is no finite number is written as null.
"""

import hashlib
import json
import math
import operator
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SUM = "cratelab_sha256"  # in the metadata of a .safetensors file; not every file has one
_PART = re.compile(r"(.+)\.\d+-[0-9a-f]{8}\.part")  # what stands beside NAME while it is written


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A place beside `path` at which to write a file or a folder, which then takes the place of `path`.

    It does so only once it is on the disk (fsync of the file, or of all in the folder, then of the folder above), so
    that whatever happens, a loss of power included, `path` is what it was or what was written. A folder replaces no
    other.

    Each writer has a place of its own, NAME.….part. If the block fails, it is removed; after a kill it stays, until who
    holds the lock calls `remove_leftovers`. At such a place, or in a folder that is one, `replacing` yields `path`
    itself: the outer block syncs, renames and removes.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    path = Path(path)
    if any(_PART.fullmatch(each.name) for each in (path, *path.parents)):
        yield path
        return
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        for written in [*part.rglob("*"), part] if part.is_dir() else [part]:
            _sync(written)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path, *patterns: str) -> None:
    """Remove what killed writers have left in a folder. Only for who knows that nobody is writing there now.

    Args:
        folder: need not exist.
        patterns: names of what was written, such as "run.json" or "checkpoint-[0-9]*".
    """
    for entry in Path(folder).glob("*.part"):
        if (part := _PART.fullmatch(entry.name)) and any(fnmatchcase(part[1], pattern) for pattern in patterns):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def cached_json(path: str | Path, made_from: object, make: Callable[[], object]) -> object:
    """What `make` returns, as JSON has it: from the file `path`, if it was made there from the same.

    Args:
        path: made anew if it is of something else or cannot be read.
        made_from: all that decides about the result, such as arguments and hashes.
        make: makes it.
    """
    digest = digest_of(made_from)
    try:
        held = read_json(path)
    except (FileNotFoundError, ValueError):
        held = {}
    if held.get("made_from") != digest or "content" not in held:
        write_json(path, {"made_from": digest, "content": make()})
        held = read_json(path)
    return held["content"]


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; a lone surrogate, which is no character, as "?"."""
    with replacing(path) as part:
        part.write_bytes(text.encode("utf8", "replace"))


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as JSON, whole or not at all; NaN and infinity as null."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def finite(content: object) -> object:
    """The same dicts, lists and numbers, with None for each number that is not finite."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: str | Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all, with a sum that `read_tensors` checks.

    Raises:
        OSError: it cannot be written, such as on a full disk; the message names `path`.
    """
    own, seen = {}, set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if (place := own[name].untyped_storage().data_ptr()) in seen:
            own[name] = own[name].clone()  # the format has no two names for the same numbers
        seen.add(place)
    try:
        with replacing(path) as part:
            save_file(own, part, (metadata or {}) | {_SUM: digest_of_tensors(own)})
    except SafetensorError as error:  # a full disk, among others
        raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """What a .safetensors or torch file holds, without unpickling any object.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is neither, would need unpickling, holds something else than a dict, or is not what
            `write_tensors` has written.
    """
    path, expected = Path(path), None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                expected = (opened.metadata() or {}).get(_SUM)
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                        raise ValueError("it is compressed, as PyTorch writes none, and could fill the memory")
            held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as plain tensors, and nothing else is ever unpickled: {error}"
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a dict of tensors; got {type(held).__name__}")
    if expected is not None and digest_of_tensors(held) != expected:
        raise ValueError(f"{path} cannot be read: it is damaged, its SHA-256 differs; copy it again, or make it anew")
    return held


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a .safetensors file, whose numbers are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none.
    """
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_metadata(path: str | Path) -> dict[str, str]:
    """What is told of the tensors in a .safetensors file, which are not read. Raises as `tensor_shapes`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of(content: object) -> str:
    """SHA-256 of what JSON can say: dicts whatever their order, lists, strings, numbers, NumPy's whole ones too."""
    return hashlib.sha256(json.dumps(finite(content), sort_keys=True, default=operator.index).encode()).hexdigest()


def digest_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def locked(path: str | Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which the system frees when the process ends, however it ends.

    Args:
        path: made if need be, and left where it is.
        busy: what to say if another process holds it; without, it is waited for.

    Raises:
        BlockingIOError: another process holds it, and `busy` is given.
    """
    from filelock import FileLock, Timeout

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout as error:
        raise BlockingIOError(busy) from error
    try:
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    """On the disk, as far as the system can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every file system syncs folders
            raise
    finally:
        os.close(descriptor)
