"""Provenance: every published number can be traced to command, commit, versions, device, seconds and data."""

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import torch

from cratelab.devices import best_device
from cratelab.storage import write_json as write_json  # also known by this module's name


def provenance(**facts) -> dict:
    """Where a number comes from: command, commit, versions and machine of this process, and the `facts` given.

    Args:
        facts: what only the caller knows, such as seeds, seconds, a hash of the data.

    Returns:
        What `json` can write. `commit` is that of the current folder's checkout, None outside one; it ends in
        "+changes" where files were edited. `cratelab` is None where the library is not installed.
    """
    device = best_device()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "cratelab": _installed(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        **facts,
    }


def read_reference(name: str) -> dict:
    """A table that longer runs made and the package carries: `provenance` and `findings`, one entry a seed.

    Raises:
        FileNotFoundError: there is no table `name`; the message says which there are.
    """
    folder = files("cratelab") / "reference"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
        raise FileNotFoundError(f"no reference table {name!r}; there are {', '.join(known)}")
    return json.loads(file.read_text(encoding="utf8"))


def _installed() -> str | None:
    """The library's version; None where it is read from a folder and not installed, such as on a borrowed machine."""
    try:
        return version("cratelab")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
