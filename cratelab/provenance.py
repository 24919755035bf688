"""Provenance: every published number can be traced to command, commit, versions, device, seconds and data."""

import ast
import datetime
import hashlib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import torch

from cratelab.devices import best_device

SPEAKS = (
    "cli",
    "viewers",
    "checks",
    "plots",
    "colours",
    "terminal",
    "provenance",
    "huggingface",
)  # rooms that move no number

_SECRET = r"(?:key|token|secret|password|passwd|passphrase|pwd|credentials?|auth|authorization)"


def provenance(**facts) -> dict:
    """Where a number comes from: command, commit, versions and machine of this process, and the `facts` given.

    Args:
        facts: what only the caller knows, such as seeds, seconds, a hash of the data.

    Returns:
        What `json` can write. `command` is without keys and passwords. `commit` is that of the current folder's
        checkout, None outside one; it ends in "+changes" where files were edited. `cratelab` is None where the library
        is not installed. `library` is `library_code()`.
    """
    device = best_device()
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else f"{device.type} ({platform.machine()})"
    return {
        "command": " ".join([*(Path(name).name for name in sys.argv[:1]), *_without_secrets(sys.argv[1:])]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "cratelab": _installed(),
        "library": library_code(),
        "device": name,
        "threads": torch.get_num_threads(),
        **facts,
    }


def library_code() -> dict[str, str]:
    """Of each module of the library that is loaded and can move a number, a hash of its code, by name.

    Comments, docstrings and layout make no difference.
    """
    names = [name for name, module in sorted(sys.modules.items()) if name.startswith("cratelab.") and module]
    return {
        own: _digest_of_module(name) for name in names if (own := name.split(".", 1)[1]).split(".")[0] not in SPEAKS
    }


def code_of(parts: Iterable[dict]) -> dict[str, str] | None:
    """The code that made all parts of a table, as `library_code` says it; "several" where it was not one and the same.

    Args:
        parts: what `provenance` said of each, or its `library` alone.

    Returns:
        None if it was not kept of some part.
    """
    code: dict[str, str] = {}
    for part in parts:
        if part.get("library") is None:
            return None
        for name, digest in part["library"].items():
            code[name] = digest if code.get(name, digest) == digest else "several"
    return code


def changed_since(facts: dict) -> list[str] | None:
    """The modules whose code is no longer what it was when `facts` were made by `provenance`; None if it was not kept.

    A number that they computed may be another today.
    """
    if facts.get("library") is None:
        return None
    return [name for name, digest in facts["library"].items() if _digest_of_module(f"cratelab.{name}") != digest]


@cache
def _digest_of_module(name: str) -> str | None:
    """None if there is no such module."""
    try:
        tree = ast.parse(inspect.getsource(import_module(name)))
    except (ImportError, OSError):  # an empty file has no source to speak of
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for i, each in enumerate(node.body) if i or not _is_text(each)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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
    """The library's version; None where it is read from a folder and not installed."""
    try:
        return version("cratelab")
    except PackageNotFoundError:
        return None


def _without_secrets(arguments: list[str]) -> list[str]:
    """The arguments, with *** for what follows a name such as --api-key, and for what looks like a key itself."""
    shown = [_hide(argument) for argument in arguments]
    for i, argument in enumerate(arguments):
        named = re.fullmatch(rf"(-*[\w.-]*{_SECRET})(=.*)?", argument, re.IGNORECASE | re.DOTALL)
        if named and named[2]:
            shown[i] = f"{named[1]}=***"
        elif named and argument.startswith("-") and i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            shown[i + 1] = "***"
    return shown


def _hide(text: str) -> str:
    for pattern, shown in [
        (r"\b(bearer|basic)\s+\S+", r"\1 ***"),
        (rf"({_SECRET}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^&\"',}}]+)", r"\1***"),
        (r"(?<=://)[^\s/@]+@|[^\s/@=\"']*:[^\s/@]*@(?=[\w\[])", "***@"),  # user:password@host
        (r"(?<![A-Za-z0-9])(?:sk|gh[opsur]|github_pat|glpat|gsk|hf|nvapi|xox[abp])[-_][\w-]{6,}", "***"),
        (r"(?<![A-Za-z0-9])(?:AKIA|AIza|eyJ)[\w.-]{12,}", "***"),
    ]:
        text = re.sub(pattern, shown, text, flags=re.IGNORECASE)
    return text


def _commit() -> str | None:
    """Nothing that a repository's own configuration names is run: no hook, monitor, filter or helper."""
    filters: dict[str, str] = {}

    def git(*arguments: str) -> str:
        settings = {"GIT_OPTIONAL_LOCKS": "0", "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1"}
        settings["GIT_CONFIG_COUNT"] = str(len(filters))
        for i, (name, value) in enumerate(filters.items()):
            settings |= {f"GIT_CONFIG_KEY_{i}": name, f"GIT_CONFIG_VALUE_{i}": value}
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", *arguments],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=20,
        )
        return done.stdout.decode(errors="replace").strip()

    try:
        commit = git("rev-parse", "HEAD")
        for name in git("config", "--list", "--name-only").splitlines():
            if re.fullmatch(r"filter\..*\.(clean|process|required)", name):
                filters[name] = "false" if name.endswith("required") else ""
        changed = git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
        return commit + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
