"""Sparse codes by iterative shrinkage-thresholding, complete and overcomplete (chapter 4).

The overcomplete code of a token z is an approximate minimiser of ½‖z − Da‖² + λ‖a‖₁ over a ≥ 0, the non-negative lasso.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.arguments import check_whole
from cratelab.devices import exact
from cratelab.ista_gradient import ista_saving_memory


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """The non-negative soft threshold S(x) = max(x − threshold, 0), entry by entry (eq-04-3).

    It is the proximal operator of threshold·‖·‖₁ restricted to a ≥ 0.

    Args:
        x: any shape.
        threshold: ηλ ≥ 0.

    Returns:
        The shape of `x`.
    """
    return F.relu(x - threshold)


def lasso_objective(z: Tensor, code: Tensor, D: Tensor, lam: float) -> Tensor:
    """½‖z − Da‖² + λ‖a‖₁ of each token (eq-04-1).

    Args:
        z: tokens, (..., n, d).
        code: non-negative codes, (..., n, h).
        D: dictionary, (d, h).
        lam: λ ≥ 0.

    Returns:
        (..., n), computed in float64 and rounded to the dtype of `z`, at least to float32.

    Raises:
        ValueError: `lam` is negative or not finite, or the shapes do not fit.
    """
    if not 0 <= lam < torch.inf:
        raise ValueError(f"the sparsity weight lam must be finite and at least 0; got {lam}")
    if D.ndim != 2 or z.shape[-1:] != D.shape[:1] or code.shape[-1:] != D.shape[1:]:
        raise ValueError(
            "tokens z (..., n, d) and codes (..., n, h) must fit the dictionary D (d, h); "
            f"got z {tuple(z.shape)}, code {tuple(code.shape)} and D {tuple(D.shape)}"
        )
    dtype, device = torch.promote_types(z.dtype, torch.float32), z.device
    z, code, D = exact(z), exact(code), exact(D)
    objective = 0.5 * (z - code @ D.mT).square().sum(-1) + lam * code.abs().sum(-1)
    return objective.to(dtype).to(device)


def ista_complete(z: Tensor, D: Tensor, step_size: float = 0.1, lam: float = 0.1, n_steps: int = 1) -> Tensor:
    """Sparsify tokens in a complete dictionary, starting from the tokens themselves (eq-04-8).

    a ← ReLU(a + η Dᵀ(z − D a) − ηλ), from a = z. With one step it is the ISTA block of the vision CRATE.

    Args:
        z: tokens, (..., n, d).
        D: complete dictionary, (d, d).
        step_size: η > 0.
        lam: λ ≥ 0.
        n_steps: at least 1.

    Returns:
        Codes, (..., n, d), non-negative.

    Raises:
        ValueError: `D` is not (d, d), or a parameter is out of range.

    Source: Yu et al. (2023).
    """
    _check(z, D, step_size, lam, n_steps)
    if D.shape[0] != D.shape[1]:
        raise ValueError(
            f"ista_complete needs a square dictionary (d, d); got {tuple(D.shape)}: use ista for an overcomplete one"
        )
    return _iterate(z, z, D, step_size, lam, n_steps)


def ista(z: Tensor, D: Tensor, step_size: float = 0.1, lam: float = 0.1, n_steps: int = 2) -> Tensor:
    """Non-negative sparse codes of the tokens in the dictionary `D`, by ISTA from zero (eq-04-5).

    a_t = S_{ηλ}(a_{t−1} + η Dᵀ(z − D a_{t−1})), a_0 = 0. The first step needs Dᵀz alone and each later one acts on the
    residual z − Da, so T steps take 2T − 1 matrix products (and the decoding D a_T one more).

    Args:
        z: tokens, (..., n, d).
        D: dictionary, (d, h); overcomplete where h > d.
        step_size: η > 0; η ≤ 1/‖D‖² (spectral norm) guarantees convergence to the lasso (eq-04-6), and the objective
            falls at every step below 2/‖D‖² (eq-04-7).
        lam: λ ≥ 0; the threshold of each step is ηλ.
        n_steps: T ≥ 1.

    Returns:
        Codes, (..., n, h), non-negative.

    Raises:
        ValueError: the widths of `z` and `D` differ, or a parameter is out of range.

    Source: Bai & Ma (2024), section 4; Beck & Teboulle (2009).
    """
    _check(z, D, step_size, lam, n_steps)
    code = soft_threshold((step_size * z) @ D, step_size * lam)  # scaled while it is narrow
    return _iterate(code, z, D, step_size, lam, n_steps - 1)


def _iterate(code: Tensor, z: Tensor, D: Tensor, step_size: float, lam: float, n_steps: int) -> Tensor:
    for _ in range(n_steps):
        code = soft_threshold(code + (step_size * (z - code @ D.mT)) @ D, step_size * lam)
    return code


def _check(z: Tensor, D: Tensor, step_size: float, lam: float, n_steps: int) -> None:
    if D.ndim != 2 or z.ndim < 1 or z.shape[-1] != D.shape[0]:
        raise ValueError(
            "the dictionary D must be (d, h) with the width d of the tokens z (..., n, d); "
            f"got D {tuple(D.shape)} and z {tuple(z.shape)}"
        )
    _check_constants(step_size, lam, n_steps)


def _check_constants(step_size: float, lam: float, n_steps: int) -> None:
    if not (0 < step_size < torch.inf and 0 <= lam < torch.inf):
        raise ValueError(f"ISTA needs step_size > 0 and lam >= 0, both finite; got step_size={step_size}, lam={lam}")
    check_whole("n_steps", n_steps)


class Ista(nn.Module):
    """The sparsifying layer (eq-04-9): `encode` tokens by a few steps of ISTA, `decode` with the same dictionary.

    Args:
        width: d.
        expansion: h/d atoms per dimension; 4 in the language model.
        step_size: η; fixed, not learned.
        lam: λ; fixed, not learned.
        n_steps: T.

    `weight` (h, d) is Dᵀ. It starts Kaiming-uniform with fan-in d, as officially.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, width: int, expansion: int = 4, step_size: float = 0.1, lam: float = 0.1, n_steps: int = 2):
        super().__init__()
        _check_constants(step_size, lam, n_steps)
        check_whole("width", width)
        check_whole("expansion", expansion)
        self.step_size, self.lam, self.n_steps = step_size, lam, n_steps
        self.weight = nn.Parameter(torch.empty(expansion * width, width))
        nn.init.kaiming_uniform_(self.weight)

    @property
    def D(self) -> Tensor:
        """The dictionary, (d, h); a view of `weight`."""
        return self.weight.mT

    def encode(self, z: Tensor) -> Tensor:
        """Tokens (..., n, d) to codes (..., n, h): `ista`, with a backward pass that saves less.

        Second derivatives, forward-mode AD and `torch.func`'s transforms are those of `ista`, as is what they cost.
        """
        _check(z, self.D, self.step_size, self.lam, self.n_steps)
        return ista_saving_memory(ista, z, self.weight, self.step_size, self.lam, self.n_steps)

    def decode(self, code: Tensor) -> Tensor:
        """Codes (..., n, h) to tokens D a (..., n, d)."""
        return code @ self.weight

    def forward(self, z: Tensor) -> Tensor:
        """Tokens (..., n, d) to their sparse reconstructions (..., n, d)."""
        return self.decode(self.encode(z))
