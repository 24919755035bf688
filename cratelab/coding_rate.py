"""Coding rates of tokens, the sparse rate reduction built from them, and their gradients (chapters 1 and 2).

Tokens are rows here, `z` of shape (..., n, d); the book writes them as the columns of Z ∈ R^{d×n}.
Rates are in nats a token: what it takes, on average, to name one token to precision ε.
Small matrices are factorised in double precision, so float32 and bfloat16 tokens are safe too.
"""

import torch
from einops import einsum
from torch import Tensor

from cratelab.devices import exact

# Beyond this ‖scale·ZᵀZ‖ the identity beside it drowns in rounding, and singular values are the accurate way.
_CHOLESKY_LIMIT = 1e10


def coding_rate(z: Tensor, eps: float = 0.5) -> Tensor:
    """Nats a token that code `z` up to precision `eps` (eq-01-2, eq-01-3).

    R(Z) = ½ logdet(I + d/(nε²) ZᵀZ), on the smaller of the two Gram matrices.

    Args:
        z: tokens, (..., n, d).
        eps: precision ε > 0, in the units of `z`.

    Returns:
        (...) rates in nats, at least 0, in the dtype of `z` (at least float32).

    Raises:
        ValueError: `z` is not (..., n, d) with n, d > 0, is not finite or not floating point, or `eps` is not positive.

    Source: Ma, Derksen, Hong & Wright (2007); Yu et al. (2023).
    """
    _check_tokens(z, eps)
    n, d = z.shape[-2:]
    return _half_logdet(z, d / (n * eps**2))


def coding_rate_gradient(z: Tensor, eps: float = 0.5) -> Tensor:
    """∇_Z R in closed form (eq-01-5): d/(nε²) Z(I + d/(nε²) ZᵀZ)⁻¹.

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
    return _shrink(z, d / (n * eps**2))


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
    """Nats a token when each subspace is coded on its own, R^c (eq-02-1).

    R^c(Z; U) = ½ Σ_k logdet(I + p/(nε²) (U_kᵀZ)ᵀ(U_kᵀZ)).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p); they need not be orthonormal.
        eps: precision ε > 0, in the units of `z`.

    Returns:
        (...) rates in nats.

    Raises:
        ValueError: as `coding_rate` and `project`.

    Source: Yu et al. (2023).
    """
    _check_tokens(z, eps)
    w = project(exact(z), exact(U))
    n, p = w.shape[-2:]
    return _half_logdet(w, p / (n * eps**2)).sum(-1).to(z.device, torch.promote_types(z.dtype, torch.float32))


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
    _check_tokens(z, eps)
    U = exact(U)
    w = project(exact(z), U)
    n, p = w.shape[-2:]
    return einsum(_shrink(w, p / (n * eps**2)), U, "... k n p, k d p -> ... n d").to(z)


def rate_reduction(z: Tensor, U: Tensor, eps: float = 0.5) -> Tensor:
    """Nats a token saved by coding subspace by subspace, ΔR = R − R^c (eq-02-2).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        eps: precision ε > 0.

    Returns:
        (...) in nats; negative where the subspaces overlap so much that coding them apart costs more.

    Raises:
        ValueError: as `subspace_rate`.

    Source: Yu et al. (2023); Yu, Chan, You, Song & Ma (2020).
    """
    return coding_rate(z, eps) - subspace_rate(z, U, eps)


def sparse_rate_reduction(z: Tensor, U: Tensor, lam: float = 0.1, eps: float = 0.5) -> Tensor:
    """The objective each CRATE layer climbs, ΔR − λ‖Z‖₁ (eq-02-4), with ‖·‖₁ summed over all entries.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        lam: weight λ ≥ 0 of sparsity, in nats per unit of `z`.
        eps: precision ε > 0.

    Returns:
        (...) in nats.

    Raises:
        ValueError: as `subspace_rate`, or `lam` is negative.

    Source: Yu et al. (2023), with ‖·‖₁ for ‖·‖₀.
    """
    if lam < 0:
        raise ValueError(f"the sparsity weight lam must be at least 0; got {lam}")
    return rate_reduction(z, U, eps) - lam * z.abs().sum((-2, -1))


def _check_tokens(z: Tensor, eps: float) -> None:
    if not z.is_floating_point() or z.ndim < 2 or 0 in z.shape[-2:]:
        raise ValueError(
            f"tokens must be floating point, (..., n, d) with n and d at least 1; got {z.dtype} {tuple(z.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"the precision eps must be positive; got {eps}")
    if not torch.isfinite(z).all():
        raise ValueError(f"tokens must be finite; {int((~torch.isfinite(z)).sum())} of {z.numel()} entries are not")


def _identity_plus_gram(z: Tensor, scale: float) -> Tensor:
    """I + scale·(the smaller Gram matrix of z): (..., m, m), m = min(n, d)."""
    n, d = z.shape[-2:]
    gram = z @ z.mT if n < d else z.mT @ z
    return torch.eye(min(n, d), dtype=z.dtype, device=z.device) + scale * gram


def _is_huge(z: Tensor, scale: float) -> bool:
    return bool((scale * torch.linalg.vector_norm(z, dim=(-2, -1)).square() > _CHOLESKY_LIMIT).any())


def _half_logdet(z: Tensor, scale: float) -> Tensor:
    """½ logdet(I + scale·zᵀz) of each matrix (..., n, d): (...)."""
    as_given = dict(device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
    z = exact(z)
    if _is_huge(z, scale):
        return 0.5 * torch.log1p(scale * torch.linalg.svdvals(z).square()).sum(-1).to(**as_given)
    cholesky = torch.linalg.cholesky(_identity_plus_gram(z, scale))
    return cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(**as_given)


def _shrink(z: Tensor, scale: float) -> Tensor:
    """scale·z(I + scale·zᵀz)⁻¹ of each matrix, in its shape and dtype; = scale·(I + scale·zzᵀ)⁻¹z."""
    given, z = z, exact(z)
    if _is_huge(z, scale):
        left, s, right = torch.linalg.svd(z, full_matrices=False)
        return ((left * (scale * s / (1 + scale * s.square())).unsqueeze(-2)) @ right).to(given)
    cholesky = torch.linalg.cholesky(_identity_plus_gram(z, scale))
    n, d = z.shape[-2:]
    solved = torch.cholesky_solve(z, cholesky) if n < d else torch.cholesky_solve(z.mT, cholesky).mT
    return (scale * solved).to(given)
