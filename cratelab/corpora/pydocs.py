"""Python's own documentation: the docstrings of the standard library, real English and code wherever Python runs.

Read from the source files on disk, never imported; nothing is shipped or fetched. The text differs a little between
Python versions, its size and character do not (about 1.7 million characters in 3.11 to 3.13).
"""

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


@dataclass
class Document:
    """One text with what is known of it.

    Attributes:
        text: the text.
        meta: facts about it; `domain` names the part of the corpus it belongs to.
    """

    text: str
    meta: dict[str, str] = field(default_factory=dict)


def standard_library(folder: str | Path | None = None) -> Iterator[Document]:
    """One document for each module of the standard library that has docstrings, in the order of their paths.

    Args:
        folder: where the sources are; the running Python's library unless given.

    Yields:
        Documents whose text is the module's docstrings in source order, parted by empty lines, with
        `meta = {"domain": top-level module, "path": path below folder}`.

    Raises:
        FileNotFoundError: `folder` holds no Python sources.

    Modules that do not parse are left out.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    paths = sorted(
        path
        for path in folder.rglob("*.py")
        if path.is_file() and not _NOT_DOCUMENTATION & set(path.relative_to(folder).parts)
    )
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no Python sources; give the folder of a standard library with .py files"
        )
    for path in paths:
        try:
            with tokenize.open(path) as file, warnings.catch_warnings(action="ignore"):
                docstrings = "\n\n".join(_docstrings(ast.parse(file.read())))
        except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
            continue  # what Python raises for null bytes, encodings that are no text, and nesting without end
        if docstrings:
            path = path.relative_to(folder)
            yield Document(docstrings + "\n", {"domain": path.parts[0].removesuffix(".py"), "path": path.as_posix()})


def _docstrings(tree: ast.Module) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text.strip()
