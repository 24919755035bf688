"""Coding rates of tokens, the sparse rate reduction built from them, and their gradients (chapters 1 and 2).

Tokens are rows here, `z` of shape (..., n, d); the book writes them as the columns of Z ∈ R^{d×n}.
Rates are in nats a token: what it takes, on average, to name one token to precision ε.
Everything is computed in double precision, whatever the tokens come in, and rounded once: rates to the dtype of the
tokens but at least to float32, since half precision has no room for a sum over many tokens; gradients to their dtype.
"""

import torch
from einops import einsum
from torch import Tensor

from cratelab.devices import exact

# Beyond this ‖scale·ZᵀZ‖ the identity beside it drowns in rounding, and singular values are the accurate way.
_CHOLESKY_LIMIT = 1e10


def coding_rate(z: Tensor, eps: float = 0.5) -> Tensor:
    """Nats a token that code `z` up to precision `eps` (eq-01-3, eq-01-4).

    R(Z) = ½ logdet(I + d/(nε²) ZᵀZ), by the Cholesky factor of the smaller of the two Gram matrices. Where tokens are
    so large that the identity would be lost in rounding, by singular values (eq-01-5): huge tokens on one line are
    right, where the formula as it stands misses by more than a nat in float32.

    Args:
        z: tokens, (..., n, d).
        eps: precision ε > 0, in the units of `z`.

    Returns:
        (...) rates in nats, at least 0, in the dtype of `z` (at least float32).

    Raises:
        ValueError: `z` is not (..., n, d) with n, d > 0, is not finite or not floating point, or `eps` is not positive
            (from 1e-100 to 1e100).

    Source: Ma, Derksen, Hong & Wright (2007); Yu et al. (2023).
    """
    return _rounded(_coding_rate(z, eps), z)


def coding_rate_gradient(z: Tensor, eps: float = 0.5) -> Tensor:
    """∇_Z R in closed form (eq-01-7): d/(nε²) Z(I + d/(nε²) ZᵀZ)⁻¹.

    Args:
        z: tokens, (..., n, d).
        eps: precision ε > 0.

    Returns:
        The gradient, (..., n, d).

    Raises:
        ValueError: as `coding_rate`.
    """
    _check_tokens(z, eps)
    n, d = z.shape[-2:]
    return _shrink(exact(z), d / (n * eps**2)).to(z.dtype).to(z.device)


def project(z: Tensor, U: Tensor) -> Tensor:
    """Coordinates of the tokens in each subspace, U_kᵀZ.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p), one d×p matrix a subspace.

    Returns:
        (..., k, n, p).

    Raises:
        ValueError: the widths of `z` and `U` differ, or `U` is not (k, d, p).
    """
    if U.ndim != 3 or z.ndim < 2 or U.shape[1] != z.shape[-1] or 0 in (*U.shape, z.shape[-2]):
        raise ValueError(
            "subspaces U must be (k, d, p) with the width d of the tokens z (..., n, d), none of them 0; "
            f"got U {tuple(U.shape)} and z {tuple(z.shape)}"
        )
    return einsum(z, U, "... n d, k d p -> ... k n p")


def subspace_rate(z: Tensor, U: Tensor, eps: float = 0.5) -> Tensor:
    """Nats a token when each subspace is coded on its own, R^c (eq-02-2).

    R^c(Z; U) = ½ Σ_k logdet(I + p/(nε²) (U_kᵀZ)ᵀ(U_kᵀZ)).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p); they need not be orthonormal.
        eps: precision ε > 0, in the units of `z`.

    Returns:
        (...) rates in nats, in the dtype of `z` (at least float32).

    Raises:
        ValueError: as `coding_rate` and `project`, or `U` is not finite or not floating point.

    Source: Yu et al. (2023).
    """
    return _rounded(_subspace_rate(z, U, eps), z)


def subspace_rate_gradient(z: Tensor, U: Tensor, eps: float = 0.5) -> Tensor:
    """∇_Z R^c in closed form (eq-03-2), the step that MSSA approximates.

    p/(nε²) Σ_k U_k U_kᵀZ (I + p/(nε²) (U_kᵀZ)ᵀ(U_kᵀZ))⁻¹.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        eps: precision ε > 0.

    Returns:
        The gradient, (..., n, d).

    Raises:
        ValueError: as `subspace_rate`.

    Source: Yu et al. (2023).
    """
    w = _projected(z, U, eps)
    n, p = w.shape[-2:]
    return einsum(_shrink(w, p / (n * eps**2)), exact(U), "... k n p, k d p -> ... n d").to(z.dtype).to(z.device)


def rate_reduction(z: Tensor, U: Tensor, eps: float = 0.5) -> Tensor:
    """Nats a token saved by coding subspace by subspace, ΔR = R − R^c (eq-02-3).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        eps: precision ε > 0.

    Returns:
        (...) in nats, in the dtype of `z` (at least float32); negative where the subspaces overlap so much that coding
        them apart costs more.

    Raises:
        ValueError: as `subspace_rate`.

    Source: Yu et al. (2023); Yu, Chan, You, Song & Ma (2020).
    """
    return _rounded(_reduction(z, U, eps), z)


def sparse_rate_reduction(z: Tensor, U: Tensor, lam: float = 0.1, eps: float = 0.5) -> Tensor:
    """The objective each CRATE layer climbs, ΔR − λ‖Z‖₁ (eq-02-6), with ‖·‖₁ summed over all entries.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        lam: weight λ ≥ 0 of sparsity, in nats per unit of `z`.
        eps: precision ε > 0.

    Returns:
        (...) in nats, in the dtype of `z` (at least float32).

    Raises:
        ValueError: as `subspace_rate`, or `lam` is negative or not finite.

    Source: Yu et al. (2023), with ‖·‖₁ for ‖·‖₀.
    """
    if not 0 <= lam < torch.inf:
        raise ValueError(f"the sparsity weight lam must be finite and at least 0; got {lam}")
    return _rounded(_reduction(z, U, eps) - lam * exact(z).abs().sum((-2, -1)), z)


def _check_tokens(z: Tensor, eps: float) -> None:
    if z.ndim < 2 or 0 in z.shape[-2:]:
        raise ValueError(
            f"tokens must be floating point, (..., n, d) with n and d at least 1; got {z.dtype} {tuple(z.shape)}"
        )
    check_precision(eps)
    _check_finite("tokens", z)


def check_precision(eps: float) -> None:
    """Raises ValueError unless ε is positive, and its square neither 0 nor infinite."""
    if not 1e-100 <= eps <= 1e100:
        raise ValueError(f"the precision eps must be positive, from 1e-100 to 1e100; got {eps}")


def _check_finite(name: str, z: Tensor) -> None:
    if not z.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {z.dtype} {tuple(z.shape)}")
    if not torch.isfinite(z).all():
        raise ValueError(f"{name} must be finite; {int((~torch.isfinite(z)).sum())} of {z.numel()} entries are not")


def _rounded(rate: Tensor, z: Tensor) -> Tensor:
    return rate.to(torch.promote_types(z.dtype, torch.float32)).to(z.device)


def _coding_rate(z: Tensor, eps: float) -> Tensor:
    _check_tokens(z, eps)
    n, d = z.shape[-2:]
    return _half_logdet(exact(z), d / (n * eps**2))


def _subspace_rate(z: Tensor, U: Tensor, eps: float) -> Tensor:
    w = _projected(z, U, eps)
    n, p = w.shape[-2:]
    return _half_logdet(w, p / (n * eps**2)).sum(-1)


def _reduction(z: Tensor, U: Tensor, eps: float) -> Tensor:
    return _coding_rate(z, eps) - _subspace_rate(z, U, eps)


def _projected(z: Tensor, U: Tensor, eps: float) -> Tensor:
    _check_tokens(z, eps)
    _check_finite("subspaces U", U)
    return project(exact(z), exact(U))


def _identity_plus_gram(z: Tensor, scale: float) -> Tensor:
    """I + scale·(the smaller Gram matrix of z): (..., m, m), m = min(n, d)."""
    n, d = z.shape[-2:]
    gram = z @ z.mT if n < d else z.mT @ z
    return torch.eye(min(n, d), dtype=z.dtype, device=z.device) + scale * gram


def _is_huge(z: Tensor, scale: float) -> bool:
    return bool((scale * torch.linalg.vector_norm(z, dim=(-2, -1)).square() > _CHOLESKY_LIMIT).any())


def _half_logdet(z: Tensor, scale: float) -> Tensor:
    """½ logdet(I + scale·zᵀz) of each matrix (..., n, d): (...)."""
    if _is_huge(z, scale):
        s = scale**0.5 * torch.linalg.svdvals(z)
        return torch.hypot(torch.ones_like(s), s).log().sum(-1)  # the square of s may be infinite
    cholesky = torch.linalg.cholesky(_identity_plus_gram(z, scale))
    return cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _shrink(z: Tensor, scale: float) -> Tensor:
    """scale·z(I + scale·zᵀz)⁻¹ of each matrix, in its shape; = scale·(I + scale·zzᵀ)⁻¹z."""
    if _is_huge(z, scale):
        left, s, right = torch.linalg.svd(z, full_matrices=False)
        s = scale**0.5 * s
        norm = torch.hypot(torch.ones_like(s), s)
        return (left * (scale**0.5 * (s / norm / norm)).unsqueeze(-2)) @ right
    cholesky = torch.linalg.cholesky(_identity_plus_gram(z, scale))
    n, d = z.shape[-2:]
    return scale * (torch.cholesky_solve(z, cholesky) if n < d else torch.cholesky_solve(z.mT, cholesky).mT)
