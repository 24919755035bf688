import sys

import pytest

from cratelab.extras import require


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'datasets'.*pip install 'cratelab\[corpora\]'"):
        require("datasets")
