"""Arrows run one way: who may import whom, read from the source, imports within functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cratelab

ROOT = Path(cratelab.__file__).parent
FILES = {
    ".".join(["cratelab", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): file
    for file in ROOT.rglob("*.py")
}
GROUND = {f"cratelab.{name}" for name in ("storage", "arguments", "devices", "terminal", "extras", "differentiation")}


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


def within(module: str, *packages: str) -> bool:
    return any(module == f"cratelab.{each}" or module.startswith(f"cratelab.{each}.") for each in packages)


def reached_from(module: str) -> set[str]:
    """All that a module imports, and what that imports, and so on."""
    seen, left = set(), [module]
    while left:
        new = IMPORTS[left.pop()] - seen
        seen |= new
        left += new
    return seen


def test_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_floor_stands_on_nothing(module):
    assert IMPORTS[module] <= GROUND


MODELS = "language_model", "generation", "weights", "crate", "gpt2", "mssa", "ista", "coding_rate"


@pytest.mark.parametrize(
    ("rooms", "above"),
    [
        (["corpora"], [*MODELS, "reading", "training", "interpret", "sae", "steering"]),
        (["sae", "steering"], ["interpret", "viewers", "experiments", "cli"]),
        (["interpret"], ["viewers", "experiments", "cli"]),
    ],
    ids=["corpora", "sae and steering", "interpret"],
)
def test_a_room_reaches_nothing_that_stands_above_it(rooms, above):
    for module in FILES:
        if within(module, *rooms):
            assert not {each for each in reached_from(module) if within(each, *above)}, module


def test_only_figures_load_matplotlib():
    drawing = [
        name
        for name, file in FILES.items()
        if any(each.split(".")[0] == "matplotlib" for each in imports(file.read_text(encoding="utf8"), at_once=True))
    ]
    assert drawing == ["cratelab.plots"]
