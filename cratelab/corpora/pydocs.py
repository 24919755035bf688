"""Python's own documentation: docstrings and comments of the standard library and of installed packages.

Real English and code wherever Python runs. Read from the source files on disk, never imported; nothing is shipped or
fetched. The text differs a little between versions, its size and character do not: the standard library's docstrings
are about 1.7 million characters in Python 3.11 to 3.13.
"""

import ast
import importlib.util
import io
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from cratelab.corpora.documents import Document
from cratelab.storage import digest_of, digest_of_file

_NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}

# Packages of scientific Python whose documentation is long and well kept; which of them are installed differs.
SCIENTIFIC = (
    "einops", "IPython", "joblib", "matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch",
)  # fmt: skip
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def standard_library(folder: str | Path | None = None, comments: bool = False) -> Iterator[Document]:
    """One document for each module of the standard library that has docstrings, in the order of their paths.

    Args:
        folder: where the sources are; the running Python's library unless given.
        comments: also the comments, each where it stands among the docstrings.

    Yields:
        Documents whose text is the module's docstrings in source order, parted by empty lines, with
        `meta = {"domain": top-level module, "path": path below folder}`.

    Raises:
        FileNotFoundError: `folder` holds no Python sources.

    Modules that do not parse are left out.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    for path, text in _texts(folder, comments):
        yield Document(text, {"domain": path.parts[0].removesuffix(".py"), "path": path.as_posix()})


def packages(names: Sequence[str] | None = None, comments: bool = True) -> Iterator[Document]:
    """One document for each module of installed packages that has documentation, package by package.

    Args:
        names: packages by the name they are imported by; of `SCIENTIFIC`, those installed, unless given.
        comments: also the comments, each where it stands among the docstrings.

    Yields:
        Documents as from `standard_library`, with `meta = {"domain": package, "path": path from package on}`.

    Raises:
        ModuleNotFoundError: a package of `names` is not installed, or holds no Python sources.

    Comments are taken block by block; left out are what tools read (`noqa` and its kind), copyright notices, and code
    that was commented out.
    """
    folders = {name: _package_folder(name) for name in (SCIENTIFIC if names is None else names)}
    if missing := [name for name, folder in folders.items() if folder is None and names is not None]:
        raise ModuleNotFoundError(f"no installed package of Python sources: {', '.join(missing)}; install or omit it")
    for name, folder in folders.items():
        if folder is not None:
            for path, text in _texts(folder, comments):
                yield Document(text, {"domain": name, "path": f"{name}/{path.as_posix()}"})


def sources(name: str) -> list[str | None]:
    """Version, where known, and SHA-256 of all source files: what decides the text of "python" or of a package."""
    folder = Path(sysconfig.get_path("stdlib")) if name == "python" else _package_folder(name)
    try:
        version = platform.python_version() if name == "python" else metadata.version(_DISTRIBUTIONS.get(name, name))
    except metadata.PackageNotFoundError:
        version = None
    digests = [[path.relative_to(folder).as_posix(), digest_of_file(path)] for path in _paths(folder)]
    return [version, digest_of(digests)]


def installed() -> list[str]:
    """The packages of `SCIENTIFIC` that are here."""
    return [name for name in SCIENTIFIC if _package_folder(name) is not None]


def _package_folder(name: str) -> Path | None:
    """Where an installed package's sources are, found without importing it."""
    spec = importlib.util.find_spec(name) if "." not in name else None
    if spec is None or not spec.submodule_search_locations or not spec.has_location:
        return None
    return Path(spec.origin).parent


def _paths(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*.py")
        if path.is_file() and not _NOT_DOCUMENTATION & set(path.relative_to(folder).parts)
    )


def _texts(folder: Path, comments: bool) -> Iterator[tuple[Path, str]]:
    """(path below folder, documentation) of the modules that have any."""
    paths = _paths(folder)
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no Python sources; give the folder of a standard library with .py files"
        )
    for path in paths:
        try:
            with tokenize.open(path) as file, warnings.catch_warnings(action="ignore"):
                source = file.read()
                pieces = list(_docstrings(ast.parse(source)))
                if comments:
                    pieces = sorted([*pieces, *_comments(source)], key=lambda piece: piece[0])
        except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError, tokenize.TokenError):
            continue  # what Python raises for null bytes, encodings that are no text, and nesting without end
        if pieces:
            yield path.relative_to(folder), "\n\n".join(text for _, text in pieces) + "\n"


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, docstring) in the order of the lines on which their owners start."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in (tree, *_statements(tree)) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield getattr(node, "lineno", 0), text.strip()


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements below a node. Only they own docstrings, and they are few beside the expressions in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every block of comments that is prose: lines that follow one another at the same column."""
    block, start, last, column = [], 0, -1, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, at = token.start
        if (line, at) != (last + 1, column) and block:
            yield from _prose(start, block)
            block = []
        if not block:
            start = line
        block.append(token.string.lstrip("#").removeprefix(" ").rstrip())
        last, column = line, at
    if block:
        yield from _prose(start, block)


_FOR_TOOLS = "noqa", "type:", "pragma:", "fmt:", "pylint:", "mypy:", "isort:", "ruff:", "!", "-*-"


def _prose(line: int, block: list[str]) -> Iterator[tuple[int, str]]:
    lines = [text for text in block if not text.lstrip(" :").startswith(_FOR_TOOLS)]
    lines = [text for text in lines if not text or any(map(str.isalnum, text))]  # no rules of dashes
    text = "\n".join(lines).strip("\n")
    if sum(map(str.isalpha, text)) < 3 or "copyright" in text.lower():
        return  # ornaments, and the notice that stands over every file
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield line, text
