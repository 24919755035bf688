"""From the gradient of R^c to multi-head subspace self-attention, one approximation at a time (chapter 3).

With W_k = U_kᵀZ, s = p/(nε²) and κ the step size, the chain is::

    exact            Z − κ s Σ_k U_k W_k (I + s W_kᵀW_k)⁻¹                compression_step
    Neumann, order m the inverse as Σ_{j≤m} (−s W_kᵀW_k)^j                neumann_gradient
    Σ_k U_kU_kᵀ ≈ I  (1 − κs) Z + κ s² Σ_k U_k W_k (W_kᵀW_k)              attention_step with gram_attention
    softmax          (1 − κs) Z + κ s² Σ_k U_k W_k softmax(W_kᵀW_k/√p)    attention_step with mssa
    learned          Z + W_out [SSA_1; …; SSA_K] + b                      Mssa, inside a residual block

The functions compute tokens of half precision in float32, whose squares and cubes half precision cannot hold, and
round once.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cratelab.arguments import check_whole
from cratelab.coding_rate import check_precision, project, subspace_rate_gradient
from cratelab.devices import single
from cratelab.differentiation import is_transformed


def compression_step(z: Tensor, U: Tensor, step_size: float, eps: float = 0.5) -> Tensor:
    """One exact gradient step that compresses the tokens, Z − κ∇R^c (eq-03-1).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        step_size: κ ≥ 0.
        eps: precision ε > 0.

    Returns:
        The moved tokens, (..., n, d).

    Raises:
        ValueError: as `cratelab.coding_rate.subspace_rate`, or `step_size` is negative or not finite.

    Source: Yu et al. (2023).
    """
    _check_step_size(step_size)
    return z - step_size * subspace_rate_gradient(z, U, eps)


def neumann_gradient(z: Tensor, U: Tensor, eps: float = 0.5, order: int = 1) -> Tensor:
    """∇R^c with the inverse replaced by its Neumann series up to `order` (eq-03-8).

    s Σ_k U_k W_k Σ_{j≤order} (−s W_kᵀW_k)^j with s = p/(nε²). The series converges to `subspace_rate_gradient` where
    s‖W_k‖² < 1 for every k, and diverges with the order elsewhere.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        eps: precision ε > 0.
        order: highest power kept; 1 is the order that leads to attention.

    Returns:
        The approximate gradient, (..., n, d).

    Raises:
        ValueError: `order` is negative or no whole number, `eps` is not positive, or the shapes do not fit.

    Source: Yu et al. (2023).
    """
    check_whole("order", order, 0)
    check_precision(eps)
    dtype, z, U = z.dtype, single(z), single(U)
    w = project(z, U)
    n, p = w.shape[-2:]
    scale = p / (n * eps**2)
    gram = w.mT @ w if p < n else w @ w.mT
    term = total = w
    for _ in range(order):  # Horner would need the powers too; each term is one product with the p×p or n×n matrix
        term = -scale * (term @ gram if p < n else gram @ term)
        total = total + term
    return einsum(scale * total, U, "... k n p, k d p -> ... n d").to(dtype)


def gram_attention(z: Tensor, U: Tensor) -> Tensor:
    """Attention by plain inner products, Σ_k U_k W_k (W_kᵀW_k) (eq-03-9): what softmax then replaces.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).

    Returns:
        (..., n, d).

    Raises:
        ValueError: the shapes do not fit.
    """
    dtype, z, U = z.dtype, single(z), single(U)
    w = project(z, U)
    n, p = w.shape[-2:]
    attended = w @ (w.mT @ w) if p < n else (w @ w.mT) @ w
    return einsum(attended, U, "... k n p, k d p -> ... n d").to(dtype)


def attention_map(z: Tensor, U: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Softmax weights with which each token attends to every other, one map a subspace (eq-03-6).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        causal: a token attends to itself and to earlier tokens only.
        scale: factor on the inner products; 1/√p unless given.

    Returns:
        (..., k, n, n); rows (queries) sum to 1 over the last axis (keys).

    Raises:
        ValueError: the shapes do not fit, or `scale` is not finite.
    """
    _check_scale(scale)
    dtype, w = z.dtype, project(single(z), single(U))
    n, p = w.shape[-2:]
    similarity = (p**-0.5 if scale is None else scale) * w @ w.mT
    if causal:
        future = torch.ones(n, n, dtype=torch.bool, device=z.device).triu(1)
        similarity = similarity.masked_fill(future, -torch.inf)
    return similarity.softmax(-1).to(dtype)


def mssa(z: Tensor, U: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Multi-head subspace self-attention, Σ_k U_k SSA_k(Z), without the factor p/(nε²) (eq-03-6, eq-03-7).

    SSA_k(Z) = W_k softmax(W_kᵀW_k · scale) with W_k = U_kᵀZ: query, key and value are one and the same projection.

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        causal: a token attends to itself and to earlier tokens only.
        scale: factor on the inner products before the softmax; 1/√p unless given (the derivation has 1).

    Returns:
        (..., n, d).

    Raises:
        ValueError: the shapes do not fit, or `scale` is not finite.

    Source: Yu et al. (2023).
    """
    _check_scale(scale)
    dtype, z, U = z.dtype, single(z), single(U)
    w = project(z, U)
    attended = attend(w, w, w, causal, scale)
    return einsum(attended, U, "... k n p, k d p -> ... n d").to(dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None = None, span: int | None = None
) -> Tensor:
    """PyTorch's attention of (..., n, p) tensors, in its plain form where the fast ones have no derivatives.

    With a `span` the last query is at the last key, and each sees its own key and `span` before it.

    They have first ones. `torch.func`'s transforms and forward-mode AD get the plain form of themselves; for a second
    backward pass through a first (`create_graph=True`) compute the model under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    mask = None
    if span is not None:
        keys = torch.arange(key.shape[-2], device=key.device)
        back = keys[-query.shape[-2] :, None] - keys
        mask, causal = (back >= 0) & (back <= span), False
    attention = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, scale=scale)
    if is_transformed(query, key, value):
        with sdpa_kernel(SDPBackend.MATH):
            return attention(query, key, value)
    return attention(query, key, value)


def attention_step(
    z: Tensor, U: Tensor, step_size: float, eps: float = 0.5, attention: Callable[[Tensor, Tensor], Tensor] = mssa
) -> Tensor:
    """The compression step once Σ_k U_kU_kᵀ ≈ I is used, (1 − κs)Z + κs²·attention(Z) with s = p/(nε²) (eq-03-10).

    Args:
        z: tokens, (..., n, d).
        U: subspace bases, (k, d, p).
        step_size: κ ≥ 0.
        eps: precision ε > 0.
        attention: `gram_attention` (first-order Neumann) or `mssa` (softmax as well).

    Returns:
        The moved tokens, (..., n, d).

    Raises:
        ValueError: `eps` is not positive, `step_size` is negative or not finite, or the shapes do not fit.

    Source: Yu et al. (2023).
    """
    check_precision(eps)
    _check_step_size(step_size)
    dtype, z, U = z.dtype, single(z), single(U)
    attended = attention(z, U)
    scale = U.shape[-1] / (z.shape[-2] * eps**2)
    return ((1 - step_size * scale) * z + step_size * scale**2 * attended).to(dtype)


def _check_step_size(step_size: float) -> None:
    if not 0 <= step_size < torch.inf:
        raise ValueError(f"the step size must be finite and at least 0; got {step_size}")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not -torch.inf < scale < torch.inf:
        raise ValueError(f"the scale of the inner products must be finite; got {scale}")


class Mssa(nn.Module):
    """MSSA as a layer (eq-03-11): one projection for query, key and value, a learned output matrix in place of the U_k.

    Args:
        width: d.
        n_heads: K subspaces of dimension p = d/K.
        causal: a token attends to itself and to earlier tokens only.
        span: to that many earlier tokens at most; causal then, whatever `causal` says.

    Input and output are (b, n, d). Parameters: `projection.weight` (d, d) holds U_kᵀ in rows kp to (k+1)p;
    `output.weight` (d, d) and `output.bias` (d,).

    Raises:
        ValueError: `n_heads` does not divide `width`.
    """

    cache_tensors = 1  # query, key and value are one tensor, so one is all that generation has to remember

    def __init__(self, width: int, n_heads: int, causal: bool = True, span: int | None = None):
        super().__init__()
        if width < 1 or n_heads < 1 or width % n_heads:
            raise ValueError(f"the width must be a multiple of the heads; got width={width}, n_heads={n_heads}")
        self.n_heads, self.causal, self.span = n_heads, causal, span
        self.projection = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)

    @property
    def U(self) -> Tensor:
        """The subspace bases, (k, d, p); a view of `projection.weight`."""
        return rearrange(self.projection.weight, "(k p) d -> k d p", k=self.n_heads)

    def forward(self, z: Tensor, cache: Tensor | None = None, position: int = 0) -> Tensor:
        """Attend over `z` (b, n, d), or over the cache (1, b, k, context, p) extended at `position` by `z`."""
        w = rearrange(self.projection(z), "b n (k p) -> b k n p", k=self.n_heads)
        keys = w
        if cache is not None:
            cache[0, :, :, position : position + z.shape[1]] = w
            keys = cache[0, :, :, : position + z.shape[1]]
        attended = attend(w, keys, keys, self.causal and position == 0, span=self.span)
        return self.output(rearrange(attended, "b k n p -> b n (k p)"))
