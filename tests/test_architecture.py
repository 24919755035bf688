"""Arrows run one way: who may import whom, read from the source, imports within functions included."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cratelab

ROOT = Path(cratelab.__file__).parent
FILES = {
    ".".join(["cratelab", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): file
    for file in ROOT.rglob("*.py")
}
PAGE = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf8")
ROWS = re.findall(r"^\| ((?:`[\w/]+` ?)+)\|", PAGE.split("## Where things live")[1].split("\n## ")[0], re.MULTILINE)
FLOORS = [re.findall(r"\w+", row) for row in ROWS]  # of the rooms, the ground floor first


def imports(source: str, at_once: bool = False) -> set[str]:
    """Full names of the modules that one imports; `at_once` only of those that it does when it is loaded."""
    found, left = set(), [ast.parse(source)]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() | ({node.module} if names - FILES.keys() else set())
        if not (at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            left += ast.iter_child_nodes(node)
    return found


IMPORTS = {name: imports(file.read_text(encoding="utf8")) & FILES.keys() for name, file in FILES.items()}


def floor(module: str) -> int:
    """On which floor the room of a module is; the package's face, which imports on demand, is everybody's."""
    if module in ("cratelab", "cratelab.__main__"):
        return 0 if module == "cratelab" else len(FLOORS)
    room = module.split(".")[1]
    (found,) = (i for i, rooms in enumerate(FLOORS) if room in rooms)  # each stands once in the table
    return found


def test_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_nothing_from_a_floor_above_its_own(module):
    assert not {each for each in IMPORTS[module] if floor(each) > floor(module)}


def test_only_figures_load_matplotlib():
    drawing = [
        name
        for name, file in FILES.items()
        if any(each.split(".")[0] == "matplotlib" for each in imports(file.read_text(encoding="utf8"), at_once=True))
    ]
    assert drawing == ["cratelab.plots"]
