import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Lasso
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import cratelab as cl

from conftest import tokens


def dictionary(d=8, h=32):
    return torch.randn(d, h, dtype=torch.float64) / d**0.5


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-3, 3), threshold=st.floats(0, 2))
def test_soft_threshold_is_the_proximal_operator(x, threshold):
    proximal = minimize_scalar(
        lambda a: 0.5 * (a - x) ** 2 + threshold * a, bounds=(0, 4), method="bounded", options={"xatol": 1e-9}
    ).x
    assert abs(float(cl.soft_threshold(torch.tensor(x, dtype=torch.float64), threshold)) - proximal) < 1e-4


@pytest.mark.parametrize("n_steps", [1, 2, 5])
@pytest.mark.parametrize("h", [8, 32])
def test_few_products_equal_the_definition(n_steps, h):
    """The definition as proximal gradient steps: autograd's gradient of ½‖z − Da‖², then the threshold."""
    z, D = tokens(2), dictionary(h=h)
    code = torch.zeros(2, 10, h, dtype=torch.float64)
    for _ in range(n_steps):
        code.requires_grad_()
        (slope,) = torch.autograd.grad(0.5 * (z - code @ D.T).square().sum(), code)
        code = (code.detach() - 0.07 * slope - 0.07 * 0.3).clamp(min=0)
    assert_close(cl.ista(z, D, step_size=0.07, lam=0.3, n_steps=n_steps), code)


def test_two_steps_take_three_products_and_the_decoding_one_more():
    layer, z = cl.Ista(8), tokens(3, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(z)
    assert counter.get_total_flops() == 4 * (2 * 3 * 10 * 8 * 32)


def test_complete_step_by_the_paper():
    z, D = tokens(), dictionary(h=8)
    Z = z.T  # columns, as in the book
    expected = torch.relu(Z + 0.1 * D.T @ (Z - D @ Z) - 0.1 * 0.2).T
    assert_close(cl.ista_complete(z, D, step_size=0.1, lam=0.2), expected)
    assert_close(cl.ista_complete(z, D), cl.ista_complete(z, D, step_size=0.1, lam=0.1, n_steps=1))
    assert_close(cl.ista(z, D), cl.ista(z, D, step_size=0.1, lam=0.1, n_steps=2))


@pytest.mark.parametrize("lam, h", [(0.02, 8), (0.1, 12), (0.2, 32)])
def test_many_steps_reach_the_lasso_of_scikit_learn(lam, h):
    z, D = tokens(n=6), dictionary(h=h)
    eta = 1 / float(torch.linalg.matrix_norm(D, 2)) ** 2
    code = cl.ista(z, D, step_size=eta, lam=lam, n_steps=50_000)
    for token, ours in zip(z, code, strict=True):
        lasso = Lasso(alpha=lam / 8, positive=True, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
        theirs = lasso.fit(D.cpu().numpy(), token.cpu().numpy()).coef_
        np.testing.assert_allclose(ours.cpu().numpy(), theirs, atol=1e-5)
        assert ((ours > 1e-5).cpu().numpy() == (theirs > 1e-5)).all()


def test_complete_ista_reaches_the_lasso_as_well():
    z, D = tokens(n=3), dictionary(h=8)
    eta = 1 / float(torch.linalg.matrix_norm(D, 2)) ** 2
    code = cl.ista_complete(z, D, step_size=eta, lam=0.1, n_steps=50_000)
    assert_close(code, cl.ista(z, D, step_size=eta, lam=0.1, n_steps=50_000), rtol=1e-4, atol=1e-5)


def test_objective_falls_at_every_step_within_the_step_size_limit():
    z, D = tokens(), dictionary()
    eta = 1 / float(torch.linalg.matrix_norm(D, 2)) ** 2
    values = [cl.lasso_objective(z, cl.ista(z, D, eta, 0.1, t), D, 0.1).sum() for t in range(1, 30)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))
    above = [cl.lasso_objective(z, cl.ista(z, D, 8 * eta, 0.1, t), D, 0.1).sum() for t in (1, 30)]
    assert above[1] > above[0]


def test_objective_by_hand():
    z = torch.tensor([[1.0, 2.0]])
    D = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    code = torch.tensor([[0.0, 1.0, 0.5]])  # z − Da = (0.5, 0.5)
    assert_close(cl.lasso_objective(z, code, D, 0.1), torch.tensor([0.25 + 0.15]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_objective_is_summed_in_double(dtype, autocast):
    z, D = (30 * tokens(n=3, d=256)).to(dtype), dictionary(256, 1024).to(dtype)
    code = cl.ista(z, D, lam=1.0).requires_grad_()
    with torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
        found = cl.lasso_objective(z, code, D, 0.1)
    exact = cl.lasso_objective(z.double(), code.double(), D.double(), 0.1)
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert torch.autograd.grad(found.sum(), code)[0].dtype == dtype


def test_layer_starts_as_officially_and_runs_its_two_steps():
    layer = cl.Ista(128)
    bound = (6 / 128) ** 0.5
    assert layer.weight.shape == (512, 128) and layer.D.shape == (128, 512)
    assert float(layer.weight.detach().abs().max()) <= bound
    assert abs(float(layer.weight.detach().std()) / (bound / 3**0.5) - 1) < 0.01
    assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) ** 2 - 17.5) < 1.7
    z = tokens(3, d=128, dtype=torch.float32)
    assert_close(layer.encode(z), cl.ista(z, layer.D, 0.1, 0.1, 2))
    assert_close(layer(z), layer.encode(z) @ layer.D.T)
    assert (layer.step_size, layer.lam, layer.n_steps) == (0.1, 0.1, 2)


def test_gradients_flow_to_tokens_and_dictionary():
    z, D = tokens(n=3).requires_grad_(), dictionary().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, D: cl.ista(z, D, 0.05, 0.01, 3), (z, D))


def test_errors_say_what_was_wrong():
    z = tokens()
    with pytest.raises(ValueError, match=r"D \(6, 24\) and z \(10, 8\)"):
        cl.ista(z, dictionary(6, 24))
    for token, D in (z[0, 0], dictionary()), (z, dictionary()[..., None]):
        with pytest.raises(ValueError, match=r"D must be \(d, h\)"):
            cl.ista(token, D)
    with pytest.raises(ValueError, match="square"):
        cl.ista_complete(z, dictionary())
    for wrong in [
        {"step_size": 0},
        {"step_size": math.nan},
        {"step_size": math.inf},
        {"lam": -0.1},
        {"lam": math.nan},
        {"lam": math.inf},
        {"n_steps": 0},
        {"n_steps": 2.5},
        {"n_steps": math.nan},
    ]:
        message = "n_steps must be at least 1" if "n_steps" in wrong else "got step_size="
        with pytest.raises(ValueError, match=message):
            cl.ista(z, dictionary(), **wrong)
        with pytest.raises(ValueError, match=message):
            cl.Ista(8, **wrong)
    for lam in -0.1, math.nan, math.inf:
        with pytest.raises(ValueError, match=f"lam must be finite and at least 0; got {lam}"):
            cl.lasso_objective(z, cl.ista(z, dictionary()), dictionary(), lam)
    with pytest.raises(ValueError, match=r"must fit the dictionary D \(d, h\); got z \(10, 8\), code \(10, 7\)"):
        cl.lasso_objective(z, z[:, :7], dictionary(), 0.1)
    for wrong in {"width": 0}, {"width": 8, "expansion": 0}, {"width": 8, "expansion": 1.5}:
        with pytest.raises(ValueError, match=r"(width|expansion) must be at least 1"):
            cl.Ista(**wrong)
