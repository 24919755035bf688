import importlib
import os
import tempfile

import numpy as np
import pytest
import torch

from cratelab.devices import best_device

_CODE_OF_MODELS = tempfile.TemporaryDirectory()  # into which transformers copies what comes with a model
os.environ["HF_MODULES_CACHE"] = _CODE_OF_MODELS.name

pytest_plugins = ["language_model_server"]  # its fixtures

if best_device().type == "cuda":  # the whole suite then runs there
    torch.set_default_device("cuda")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def check_pages():
    """book/check_pages.py, where there is a browser."""
    pytest.importorskip("selenium", reason="the extra `browse` is not installed")
    module = importlib.import_module("check_pages")
    if module.chromium() is None:
        pytest.skip("no Chromium")
    return module


def tokens(*batch: int, n: int = 10, d: int = 8, dtype=torch.float64, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*batch, n, d, dtype=dtype)


def subspaces(k: int = 4, d: int = 8, p: int = 2, orthogonal: bool = False) -> torch.Tensor:
    """(k, d, p) with orthonormal columns; with `orthogonal` also orthogonal to each other (k·p ≤ d)."""
    if orthogonal:
        basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
        return basis[:, : k * p].reshape(d, k, p).permute(1, 0, 2).contiguous()
    return torch.linalg.qr(torch.randn(k, d, p, dtype=torch.float64)).Q
