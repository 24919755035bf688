"""What the tests of every tool share: an exported CRATE, and the code that the page prints for the tool."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cratelab as cl
from cratelab.experiments.reference_models import load_reference, load_reference_tokenizer

PAGE = Path(__file__).parents[2] / "book/use_your_own_model.md"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def crate() -> cl.Crate:
    return load_reference("crate", "2L")


@pytest.fixture(scope="session")
def exported(crate, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "crate"
    cl.to_huggingface(crate, folder, load_reference_tokenizer())
    return folder


@pytest.fixture
def printed(tmp_path, monkeypatch) -> Callable[[str], dict]:
    """Runs what the page prints under a tool's heading, after what it prints for all tools; gives the names it made."""
    monkeypatch.chdir(tmp_path)

    def run(tool: str) -> dict:
        part = PAGE.read_text(encoding="utf8").split("\n## In the tools you have\n")[1].split("\n## ")[0]
        common, *sections = re.split(r"^### ", part, flags=re.MULTILINE)
        (section,) = (each for each in sections if each.split("\n")[0] == tool)
        blocks = re.findall(r"^```python\n(.*?)^```", common + section, re.DOTALL | re.MULTILINE)
        script, names = tmp_path / "printed.py", {"__name__": "printed"}
        script.write_text("\n".join(blocks), encoding="utf8")  # nnsight reads the source of what it runs
        exec(compile(script.read_text(encoding="utf8"), script, "exec"), names)
        return names

    return run
