"""Exercises and solutions run as in Colab: the wheel alone, another folder, no checkout, no network."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from itertools import compress
from pathlib import Path

import nbformat
import pytest
from notebooks import ROOT
from packaging.requirements import Requirement

import exercises

NOTEBOOKS = [path for slug in exercises.slugs() for path in exercises.paths(slug)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = " ".join((ROOT / "README.md").read_text(encoding="utf8").split())
SMALL = "einops", "lazy_loader", "tyro", "docstring-parser", "typeguard"  # what Colab lacks, or has an older one of
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what it is made of."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "cratelab", source / "cratelab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def outcome(wheel, tmp_path_factory) -> dict:
    """What run_notebooks.py says of every notebook, in a new environment after its own set-up cell."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    python = folder / "env" / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "env")})
    # What Colab has already. Nested .pth files are not followed: an editable cratelab is left out.
    Path(packages, "installed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "COV_"))}
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FORCE_REINSTALL": "1", "PIP_CONFIG_FILE": os.devnull}
    environment = clean | pip | {"CRATELAB_SOURCE": str(wheel), "PYTHONNOUSERSITE": "1", "HOME": str(folder)}

    def start(*command: object) -> str:
        run = subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    missing = "import importlib.util; print(importlib.util.find_spec('cratelab'))"
    assert start("-c", missing) == "None\n"
    setup = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    start("-c", setup)
    environment["CRATELAB_SOURCE"] = "/nowhere"  # the set-up cells that follow must leave everything as it is
    copies = []
    for path in NOTEBOOKS:
        copies.append(folder / path.parent.name / path.name)
        copies[-1].parent.mkdir(exist_ok=True)
        shutil.copy(path, copies[-1])
    report = json.loads(start(ROOT / "tests" / "run_notebooks.py", *copies).splitlines()[-1])
    assert all(Path(entry["library"]).is_relative_to(folder) for entry in report.values())
    return {f"{Path(path).parent.name}/{Path(path).name}": entry for path, entry in report.items()}


def test_what_is_installed_is_as_small_as_the_readme_says(wheel):
    stated = re.search(r"There (\d+) MB are installed \((\d+) MB as wheels\): .* is (\d+), the rest", README)
    with zipfile.ZipFile(wheel) as content:
        library = sum(entry.file_size for entry in content.infolist()) / 1e6
    others = sum(file.size or 0 for name in SMALL for file in distribution(name).files) / 1e6
    assert [round(library + others), round(library)] == [int(stated[1]), int(stated[3])]
    assert wheel.stat().st_size / 1e6 < int(stated[2]) < library


def test_all_files_of_the_library_are_in_the_wheel(wheel):
    kept = {path for path in (ROOT / "cratelab").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as content:
        assert {path.relative_to(ROOT).as_posix() for path in kept} <= {*content.namelist()}


def test_all_else_that_the_library_needs_comes_with_what_the_readme_says_is_there():
    there = {"torch", "accelerate", "numpy", "scipy", "matplotlib"}
    assert all(name in README.lower() for name in there)
    needed = {Requirement(line).name for line in PROJECT["dependencies"]}
    theirs = {Requirement(line).name for name in there for line in distribution(name).requires or ()}
    assert needed - {*SMALL} <= there | theirs | {"tqdm"}


@pytest.mark.parametrize("slug", exercises.slugs())
def test_every_solution_runs_and_prints_what_its_notebook_holds(outcome, slug):
    assert outcome[f"solutions/{slug}.ipynb"]["errors"] == []
    code = [cell for cell in nbformat.read(exercises.paths(slug)[1], as_version=4).cells if cell.cell_type == "code"]
    held = ["".join(output["text"] for output in cell.outputs if output.output_type == "stream") for cell in code]
    same = ["nbval-ignore-output" not in cell.metadata.get("tags", []) for cell in code]
    assert list(compress(outcome[f"solutions/{slug}.ipynb"]["printed"], same)) == list(compress(held, same))


@pytest.mark.parametrize("slug", exercises.slugs())
def test_exercises_fail_only_where_a_function_is_still_to_be_written(outcome, slug):
    _, list_ = exercises.read(slug)
    errors = outcome[f"exercises/{slug}.ipynb"]["errors"]
    assert [message for kinds, message in errors if "NotImplementedError" not in kinds] == []
    named = {message for _, message in errors}
    assert named == {f"Exercise {exercise.number} is yours to write" for exercise in list_}
