"""pyproject.toml, constraints.txt and environment.yml say the same, and `import cratelab` stays light."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = sorted({*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)})
HEAVY = [
    *("matplotlib", "sklearn", "scipy", "transformers", "IPython"),
    *("datasets", "tiktoken", "tokenizers", "pandas", "pyarrow", "filelock"),
]


def pins() -> dict[str, str]:
    """Package name -> the one version that constraints.txt allows."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_every_requirement_has_a_tested_version_in_its_range(line):
    requirement = Requirement(line)
    version = pins().get(canonicalize_name(requirement.name))
    assert version, f"pyproject.toml asks for {line}: add its tested version to constraints.txt"
    assert requirement.specifier.contains(version, prereleases=True), f"{line} excludes the tested {version}"


def test_the_versions_of_python_that_were_tested_are_the_same_wherever_they_are_named():
    named = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"])
    tested = [match[1] for match in named if match]
    assert f"(tested with {' and '.join(tested)}, on Linux)" in (ROOT / "README.md").read_text()
    assert f", on Python {' and '.join(tested)}: " in (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert f"python={tested[0]}" in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_torch_is_pinned_without_a_local_build():
    assert pins()["torch"] == "2.13.0"  # "+cpu" could be installed only where that build is served


def test_conda_environment_installs_the_same():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_lines,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert pip_lines == ["-c constraints.txt", "-e .[book,test,corpora]"]
    (python,) = (entry for entry in dependencies if isinstance(entry, str) and entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def test_make_installs_the_same():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert "-c constraints.txt -e '.[book,test,corpora,browse]'" in lines[0]  # the tools have their own


def test_import_stays_light():
    code = f"import sys, cratelab; print(*(set({HEAVY}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
