import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import cratelab as cl

from conftest import subspaces, tokens

RATES = {
    "coding_rate": lambda z: cl.coding_rate(z, 0.3),
    "subspace_rate": lambda z: cl.subspace_rate(z, subspaces(), 0.3),
    "subspace_rate_gradient": lambda z: cl.subspace_rate_gradient(z, subspaces(), 0.3),
    "coding_rate_gradient": lambda z: cl.coding_rate_gradient(z, 0.3),
}


def numpy_rate(z: torch.Tensor, eps: float) -> float:
    """R by numpy's slogdet of the d×d matrix, whatever n and d are."""
    z = z.cpu().double().numpy()
    n, d = z.shape
    return 0.5 * np.linalg.slogdet(np.eye(d) + d / (n * eps**2) * z.T @ z)[1]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), d=st.integers(1, 12), eps=st.floats(0.05, 5), seed=st.integers(0, 1000))
def test_rate_is_numpys_logdet_on_either_side_of_square(n, d, eps, seed):
    torch.manual_seed(seed)
    z = tokens(n=n, d=d)
    assert math.isclose(float(cl.coding_rate(z, eps)), numpy_rate(z, eps), rel_tol=1e-9)


def test_rate_of_one_direction_is_a_logarithm_known_by_hand():
    z = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)  # ‖·‖² = 25 along one axis; n = d = 2
    assert_close(cl.coding_rate(z, eps=1.0), torch.tensor(0.5 * math.log(26), dtype=torch.float64))


def test_batches_are_rated_one_by_one():
    z, U = tokens(3, 2), subspaces()
    for rate in cl.coding_rate, lambda z: cl.subspace_rate(z, U), lambda z: cl.sparse_rate_reduction(z, U):
        one_by_one = torch.stack([torch.stack([rate(matrix) for matrix in row]) for row in z])
        assert_close(rate(z), one_by_one)


def test_an_empty_batch_has_no_rates():
    assert cl.rate_reduction(tokens(2, 0), subspaces()).shape == (2, 0)


def test_subspace_rate_is_the_sum_of_the_rates_of_the_parts():
    z, U = tokens(n=30), subspaces(orthogonal=True)
    apart = sum(numpy_rate(z @ U_k, 0.4) for U_k in U)
    assert math.isclose(float(cl.subspace_rate(z, U, 0.4)), apart, rel_tol=1e-10)


def test_objective_is_reduction_minus_the_summed_l1_norm():
    z, U = tokens(n=5), subspaces()
    reduction = numpy_rate(z, 0.3) - sum(numpy_rate(z @ U_k, 0.3) for U_k in U)
    for lam in 0.0, 0.2:
        expected = reduction - lam * float(z.abs().sum())
        assert math.isclose(float(cl.sparse_rate_reduction(z, U, lam, 0.3)), expected, rel_tol=1e-10)
    assert_close(cl.sparse_rate_reduction(z, U), cl.sparse_rate_reduction(z, U, lam=0.1, eps=0.5))


@pytest.mark.parametrize("n, d", [(10, 8), (3, 8), (8, 8), (100, 8)])
def test_gradients_are_those_of_the_rates(n, d):
    z, U = tokens(2, n=n, d=d).requires_grad_(), subspaces(d=d)
    for rate, closed_form in [
        (lambda z: cl.coding_rate(z, 0.3), cl.coding_rate_gradient(z, 0.3)),
        (lambda z: cl.subspace_rate(z, U, 0.3), cl.subspace_rate_gradient(z, U, 0.3)),
    ]:
        (autograd,) = torch.autograd.grad(rate(z).sum(), z)
        assert_close(closed_form, autograd)


def test_gradient_agrees_with_finite_differences():
    z, U = tokens(n=4), subspaces()
    closed_form, step = cl.subspace_rate_gradient(z, U), 1e-6
    for index in [(0, 0), (1, 5), (3, 7)]:
        nudge = torch.zeros_like(z)
        nudge[index] = step
        slope = (cl.subspace_rate(z + nudge, U) - cl.subspace_rate(z - nudge, U)) / (2 * step)
        assert_close(closed_form[index], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RATES)
def test_everything_is_differentiable_in_double_precision(name):
    torch.manual_seed(1)
    z = tokens(n=3, d=8).requires_grad_()

    def seeded(z):
        torch.manual_seed(2)  # RATES draw their subspaces
        return RATES[name](z)

    assert torch.autograd.gradcheck(seeded, z)


@pytest.mark.parametrize("scale", [2.0**-26, 1.0, 2.0**13, 2.0**26, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_one_tokens_of_any_size_cost_one_logarithm(scale, dtype):
    z = (scale * torch.outer(torch.arange(1.0, 10), torch.arange(1.0, 7))).to(dtype).requires_grad_()  # exact
    energy = float(z.detach().double().square().sum())
    expected = 0.5 * math.log1p(6 / (9 * 0.25) * energy)
    rate = cl.coding_rate(z)
    assert math.isclose(float(rate.detach()), expected, rel_tol=1e-5, abs_tol=1e-13)  # double holds 16 digits
    (autograd,) = torch.autograd.grad(rate, z)
    assert_close(cl.coding_rate_gradient(z), autograd, rtol=1e-3, atol=float(autograd.abs().max()) * 1e-5)
    if scale == 2.0**26 and dtype == torch.float32:
        as_it_stands = 0.5 * torch.logdet(torch.eye(6) + 6 / (9 * 0.25) * z.T @ z)
        assert not abs(float(as_it_stands.detach()) - expected) < 1  # rounding swamps the five empty directions


def test_huge_tokens_in_a_batch_are_rated_as_they_are_alone():
    z = torch.stack([tokens(), 2.0**30 * torch.outer(torch.arange(1.0, 11), torch.arange(1.0, 9)).double()])
    for function in cl.coding_rate, cl.coding_rate_gradient:
        assert_close(function(z), torch.stack([function(matrix) for matrix in z]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("n, d", [(2000, 3), (3, 2000)])
def test_long_and_wide_matrices_are_coded_by_the_small_gram_matrix(n, d):
    z = tokens(n=n, d=d, dtype=torch.float32)
    assert math.isclose(float(cl.coding_rate(z)), numpy_rate(z, 0.5), rel_tol=1e-5)


def test_low_precision_tokens_are_coded_in_high_precision():
    z = tokens(n=16).bfloat16()
    assert cl.coding_rate(z).dtype == torch.float32 and cl.coding_rate_gradient(z).dtype == torch.bfloat16
    assert math.isclose(float(cl.coding_rate(z)), numpy_rate(z, 0.5), rel_tol=1e-6)


def test_rotating_the_tokens_leaves_the_rate_and_shuffling_them_too():
    z = tokens()
    rotation = torch.linalg.qr(tokens(n=8)).Q
    shuffled = z[torch.randperm(10)]
    assert_close(cl.coding_rate(z @ rotation), cl.coding_rate(z))
    assert_close(cl.coding_rate(shuffled), cl.coding_rate(z))


BAD_TOKENS = {
    "no token": (torch.zeros(0, 8), "at least 1"),
    "no width": (torch.zeros(4, 0), "at least 1"),
    "a vector": (torch.zeros(8), "got torch.float32 (8,)"),
    "integers": (torch.zeros(4, 8, dtype=torch.long), "torch.int64"),
    "not a number": (torch.full((4, 8), torch.nan), "32 of 32 entries"),
    "infinite": (torch.full((4, 8), torch.inf), "finite"),
}


@pytest.mark.parametrize("z, message", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_tokens_are_named(z, message):
    U = subspaces().float()
    for function in cl.coding_rate, cl.coding_rate_gradient:
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            function(z)
    for function in cl.subspace_rate, cl.subspace_rate_gradient, cl.rate_reduction, cl.sparse_rate_reduction:
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            function(z, U)


def test_misshapen_subspaces_are_named_with_both_shapes():
    with pytest.raises(ValueError, match=r"U \(4, 6, 2\) and z \(10, 8\)"):
        cl.subspace_rate(tokens(), subspaces(d=6))
    for z, U in (tokens(), subspaces()[0]), (tokens(), subspaces()[..., None]), (tokens()[0], subspaces()):
        with pytest.raises(ValueError, match=r"\(k, d, p\)"):
            cl.project(z, U)


def test_subspace_rates_of_half_precision_tokens_lose_nothing_to_the_projection():
    z, U = tokens(n=16), subspaces()
    for half in torch.bfloat16, torch.float16:
        exact = cl.subspace_rate(z.to(half).double(), U.to(half).double())
        assert_close(cl.subspace_rate(z.to(half), U.to(half)), exact.float(), rtol=1e-6, atol=0)
    large = (300 * z).half()  # its squares overflow half precision
    assert (
        torch.isfinite(cl.subspace_rate(large, U.half()))
        and torch.isfinite(cl.subspace_rate_gradient(large, U.half())).all()
    )


HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


def objective(z, U):
    return {
        "R": cl.coding_rate(z),
        "R^c": cl.subspace_rate(z, U),
        "ΔR": cl.rate_reduction(z, U),
        "ΔR − λ‖Z‖₁": cl.sparse_rate_reduction(z, U),
    }


@HALF
@pytest.mark.parametrize("autocast", [False, True])
def test_many_tokens_of_half_precision_are_summed_as_in_double(half, autocast):
    z, U = tokens(2, n=2000, d=64).to(half), subspaces(k=4, d=64, p=16).to(half)
    exact = {name: rate.float() for name, rate in objective(z.double(), U.double()).items()}
    with torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
        assert_close(objective(z, U), exact, rtol=1e-6, atol=0)


@HALF
def test_large_tokens_of_half_precision_have_a_finite_objective(half):
    z, U = (1000 * tokens(n=2000, d=64)).to(half), subspaces(k=4, d=64, p=16).to(half)  # ‖Z‖₁ is about 1e8
    expected = cl.sparse_rate_reduction(z.double(), U.double())
    assert_close(cl.sparse_rate_reduction(z, U), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_the_objective_are_the_exact_ones_in_the_tokens_dtype(dtype):
    z, U = tokens(n=200, d=16).to(dtype).requires_grad_(), subspaces(d=16).to(dtype).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (z, U)]
    slopes = torch.autograd.grad(cl.sparse_rate_reduction(z, U), (z, U))
    expected = torch.autograd.grad(cl.sparse_rate_reduction(*exact), exact)
    error = 4 * torch.finfo(dtype).eps
    assert all(slope.dtype == dtype for slope in slopes)
    assert_close([slope.double() for slope in slopes], list(expected), rtol=error, atol=error)


def test_a_result_is_float32_for_float32_and_float64_for_float64():
    for dtype in torch.float32, torch.float64:
        assert {rate.dtype for rate in objective(tokens().to(dtype), subspaces().to(dtype)).values()} == {dtype}


@pytest.mark.parametrize("scale", [1e-300, 1e160, 1e300])
def test_tokens_whose_squares_no_double_holds_are_rated(scale):
    z = torch.zeros(4, 4, dtype=torch.float64)
    z[0, 0] = scale  # R = ½ log(1 + scale²/ε²), and its slope scale/ε² / (1 + scale²/ε²)
    expected = 0.0 if scale < 1 else math.log(scale) - math.log(0.5)
    assert math.isclose(float(cl.coding_rate(z)), expected, rel_tol=1e-12)
    slope = scale / 0.25 if scale < 1 else 1 / scale
    assert math.isclose(float(cl.coding_rate_gradient(z)[0, 0]), slope, rel_tol=1e-12)


@pytest.mark.parametrize("eps", [-math.inf, -1.0, 0.0, 1e-200, 1e200, math.inf, math.nan])
def test_a_precision_that_cannot_be_squared_is_refused(eps):
    z, U = tokens(), subspaces()
    for call in [
        lambda: cl.coding_rate(z, eps),
        lambda: cl.coding_rate_gradient(z, eps),
        lambda: cl.subspace_rate(z, U, eps),
        lambda: cl.subspace_rate_gradient(z, U, eps),
        lambda: cl.rate_reduction(z, U, eps),
        lambda: cl.sparse_rate_reduction(z, U, 0.1, eps),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"eps must be positive, from 1e-100 to 1e100; got {eps}")):
            call()


@pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf])
def test_a_sparsity_weight_is_finite_and_at_least_zero(lam):
    with pytest.raises(ValueError, match=f"lam must be finite and at least 0; got {lam}"):
        cl.sparse_rate_reduction(tokens(), subspaces(), lam)


@pytest.mark.parametrize(
    "U, message",
    [
        (torch.full((4, 8, 2), torch.nan, dtype=torch.float64), "subspaces U must be finite; 64 of 64"),
        (torch.full((4, 8, 2), torch.inf, dtype=torch.float64), "subspaces U must be finite; 64 of 64"),
        (torch.ones(4, 8, 2, dtype=torch.long), "subspaces U must be floating point; got torch.int64"),
    ],
    ids=["NaN", "infinite", "integers"],
)
def test_subspaces_that_are_no_numbers_are_named(U, message):
    for function in cl.subspace_rate, cl.subspace_rate_gradient, cl.rate_reduction, cl.sparse_rate_reduction:
        with pytest.raises(ValueError, match=message):
            function(tokens(), U)
