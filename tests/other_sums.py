"""A plug-in for pytest: matrix products add up in another order, one that depends on how many rows there are.

Some CPUs compute so and others do not, so that a test may hold on one of them alone. Here it fails on every one:

    python -m pytest -n 0 -p tests.other_sums tests/test_steering.py

What two processes compute is not comparable then: tests that kill a process and go on in another fail by right.
"""

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # plug-ins come before conftest.py

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")


def product(left: Tensor, right: Tensor) -> Tensor:
    *batch, rows, inner = left.shape
    multiply = torch.bmm if batch else torch.mm
    if inner < 3 or not left.is_floating_point():
        return multiply(left, right, out=left.new_empty(*batch, rows, right.shape[-1]))
    cut = 1 + 7 * rows % (inner - 1)
    parts = (left[..., :cut], right[..., :cut, :]), (left[..., cut:], right[..., cut:, :])
    first, second = (multiply(a, b, out=left.new_empty(*batch, rows, right.shape[-1])) for a, b in parts)
    return first + second


def with_sum(total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * total + alpha * product(left, right)


with warnings.catch_warnings(action="ignore"):  # that they replace others, which is what they are for
    for name, function in {"mm": product, "bmm": product, "addmm": with_sum, "baddbmm": with_sum}.items():
        LIBRARY.impl(name, function, "CPU")
