"""The moving picture of the ninety points: its numbers are the library's, and it works in a browser."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from javascript import engine
from notebooks import BOOK

import cratelab as cl
from cratelab.three_lines import three_lines

STATIC = BOOK / "_static"
Z, LINE, BASES = three_lines()
LINES = BASES[:, :, 0]
# Points at other lengths than the library's own, of which some lie far from every line.
AWAY = Z * torch.linspace(0.3, 3, 90, dtype=torch.float64)[:, None] + torch.tensor([0.1, -0.4, 0.2])
CLOUDS = pytest.mark.parametrize("z", [Z, AWAY], ids=["the points", "others"])
MATH = engine(STATIC / "three_lines_math.js")


def page(name, *arguments, **options):
    """What the page computes; tensors go there and lists come back."""
    plain = [x.tolist() if isinstance(x, torch.Tensor) else x for x in arguments]
    return MATH.call(f"threeLines.{name}", *plain, *([options] if options else []))


def same(found, expected, atol=1e-9, rtol=1e-9):
    found = torch.as_tensor(found, dtype=torch.float64)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=atol, rtol=rtol)


@pytest.mark.parametrize(("noise", "degrees"), [(0.12, 35), (0, 35), (0.4, 90), (0.3, 10)])
def test_the_points_are_the_librarys(noise, degrees):
    found = page("points", noise, degrees)
    z, line, U = three_lines(noise, degrees)
    same(found["z"], z, atol=0.6e-4 * noise + 1e-12)  # the page's noise has four decimals
    same(found["U"], U[:, :, 0], atol=1e-12)
    assert found["line"] == line.tolist()


@CLOUDS
@pytest.mark.parametrize("eps", [0.05, 0.5, 1])
def test_rates_and_gradients(z, eps):
    same(page("codingRate", z, eps), cl.coding_rate(z, eps))
    same(page("codingRateGradient", z, eps), cl.coding_rate_gradient(z, eps))
    same(page("subspaceRate", z, LINES, eps), cl.subspace_rate(z, BASES, eps))
    same(page("subspaceRateGradient", z, LINES, eps), cl.subspace_rate_gradient(z, BASES, eps))
    same(page("compressionStep", z, LINES, 9.5, eps), cl.compression_step(z, BASES, 9.5, eps))


def test_eigenvectors():
    matrices = [Z.mT @ Z, AWAY.mT @ AWAY, torch.diag(torch.tensor([3.0, 1.0, 2.0])), torch.ones(3, 3), torch.eye(3)]
    for matrix in matrices:
        found = page("eigen", matrix)
        values, vectors = (torch.tensor(found[name], dtype=torch.float64) for name in ("values", "vectors"))
        matrix = matrix.double()
        same(vectors @ vectors.mT, torch.eye(3))
        same(vectors.mT @ values.diag() @ vectors, matrix, atol=1e-9 * float(matrix.norm()))


def fitted(z, group, U):
    """Chapter 2's: the best line through each group, (k, d, 1); one without tokens stays."""
    U = U.clone()
    for k in range(len(U)):
        if (group == k).any():
            U[k] = torch.linalg.svd(z[group == k], full_matrices=False).Vh[:1].T
    return U


def climb(z, lam, eps, steps, step_size=1.8):
    """Chapter 2's climb with refitted lines."""
    U = fitted(z, LINE, torch.zeros(3, 3, 1, dtype=torch.float64))
    for _ in range(steps + 1):
        yield z, U
        z = z + step_size * (cl.coding_rate_gradient(z, eps) - cl.subspace_rate_gradient(z, U, eps))
        z = z.sign() * (z.abs() - step_size * lam).clamp(min=0)
        z = F.normalize(z, dim=-1)
        U = fitted(z, (z @ U.squeeze(-1).T).abs().argmax(-1), U)


@pytest.mark.parametrize(("lam", "eps"), [(0, 0.5), (0.01, 0.5), (0.03, 0.2), (0.001, 1)])
def test_the_climb_is_that_of_chapter_2(lam, eps):
    start = F.normalize(Z, dim=-1)
    same(page("normalised", Z), start)
    found = page("climb", start, LINE, steps=60, lam=lam, eps=eps)
    for step, (z, U) in enumerate(climb(start, lam, eps, 60)):
        atol = 1e-9 * 1.3**step  # a point near a tie magnifies rounding, step by step
        same(found[step]["z"], z, atol=min(atol, 1e-5))
        U = U[:, :, 0]
        lines = torch.tensor(found[step]["U"], dtype=torch.float64)
        same((lines * U).sum(-1).abs(), torch.ones(3, dtype=torch.float64), atol=min(atol, 1e-5))
    same(page("norm1", z), z.abs().sum())
    same(page("nearZero", z), (z.abs() < 1e-3).double().mean())
    assert len(found) == 61


def test_a_line_without_points_stays():
    group = torch.zeros(90, dtype=torch.long)
    same(page("fitted", Z, group, LINES)[1], LINES[1], atol=0)


@CLOUDS
@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.4])
def test_the_denoiser_is_tweedies(z, sigma):
    """The posterior mean is z + σ² ∇ log p(z), with p the mixture's density, by PyTorch's own distributions."""
    covariances = LINES[:, :, None] * LINES[:, None] + sigma**2 * torch.eye(3, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariances)
    z = z.clone().requires_grad_()
    log_densities = parts.log_prob(z[:, None])
    (score,) = torch.autograd.grad(log_densities.logsumexp(-1).sum(), z)
    same(page("denoise", z, LINES, sigma), (z + sigma**2 * score).detach(), atol=1e-8)
    same(page("membership", z, LINES, sigma), log_densities.softmax(-1).detach(), atol=1e-8)


def test_without_noise_there_is_nothing_to_remove():
    same(page("denoise", Z, LINES, 0), Z, atol=0)


@CLOUDS
def test_softmax_over_tokens(z):
    same(page("mssa", z, LINES), cl.mssa(z, BASES))


def test_a_step_is_as_long_as_said():
    moved = torch.tensor(page("moved", Z, AWAY, 0.3), dtype=torch.float64)
    same(moved, Z + 0.3 * Z.norm() * AWAY / AWAY.norm())
    same(page("moved", Z, 0 * Z, 0.3), Z, atol=0)


@CLOUDS
def test_stray_share(z):
    own = cl.project(z, BASES).square()[LINE, torch.arange(90), 0]
    expected = (1 - own / z.square().sum(-1)).mean()
    same(page("strayShare", z, LINES, LINE), expected)
    same(page("strayShare", torch.cat([z, torch.zeros(1, 3)]), LINES, [*LINE.tolist(), 0]), expected)


@CLOUDS
@pytest.mark.parametrize(("step_size", "lam", "steps"), [(0.1, 0.1, 2), (0.18, 0.5, 50), (0.3, 0, 5), (0.1, 0.1, 1)])
def test_sparse_codes(z, step_size, lam, steps):
    D = torch.cat([LINES, -LINES]).mT
    same(page("atoms", LINES), D.mT)
    code = cl.ista(z, D, step_size, lam, steps)
    same(found := page("ista", z, D.mT, step_size, lam, steps), code)
    same(page("decode", found, D.mT), code @ D.mT)
    same(page("lassoObjective", z, found, D.mT, lam), cl.lasso_objective(z, code, D, lam))
    same(page("active", found), (code != 0).double().sum(-1).mean())


@pytest.mark.parametrize(("kappa", "lam"), [(0.3, 0.1), (1, 1), (0, 0)])
def test_a_layer(kappa, lam):
    D = torch.cat([LINES, -LINES]).mT
    half = Z + kappa * cl.mssa(math.sqrt(3) * F.normalize(Z, dim=-1), BASES)
    code = cl.ista(math.sqrt(3) * F.normalize(half, dim=-1), D, 0.1, lam)
    found = page("layer", Z, LINES, kappa=kappa, lam=lam)
    same(found["half"], half)
    same(found["code"], code)
    same(found["full"], code @ D.mT)
