"""The Python that stands in pages outside the chapters runs as it is printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "book/use_your_own_model.md"]


@pytest.mark.parametrize("page", PAGES)
def test_printed_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf8").split("\n### ")[0]  # tools of others are tried by `make interop`
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks, f"{page} shows no code"
    exec(compile("\n".join(blocks), page, "exec"), {})
