"""What an auto-encoder is told, and how its code is kept sparse: one class an architecture.

A new architecture is a new class here and its line in `ARCHITECTURES`; training, files, scores and splices ask only
for what `Architecture` says.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class SaeConfig:
    """What an auto-encoder is, and how its code is kept sparse.

    Attributes:
        d_in: neurons that it reads.
        expansion: m / d_in, features per neuron; 16 in the paper.
        kind: "relu", trained with an L1 penalty (the paper's); "batchtopk", trained to have k active features a token
            on average, and used with a threshold; "jumprelu", a threshold for each feature, and "topk", of each token
            the k largest, which are read from files only.
        l1: λ, the weight of the penalty Σ|f|; for "relu". The paper's 8e-5 goes with errors averaged over 512 neurons
            and divided by ‖x‖; ours are summed and divided by ‖x‖², so that 1e-2 stands for about the same.
        k: active features a token; for "batchtopk" and "topk". Of the former in use the threshold decides, the same
            for all features: the largest value that training dropped, averaged over its batches with a rate of 0.01.

    Raises:
        ValueError: a value is of another type, not finite or out of range.
    """

    d_in: int
    expansion: float = 16
    kind: str = "relu"
    l1: float = 1e-2
    k: int = 32

    def __post_init__(self):
        if self.kind not in list(ARCHITECTURES):
            raise ValueError(f"kind must be one of {', '.join(ARCHITECTURES)}; got {self.kind!r}")
        for name, kind in ("d_in", int), ("k", int), ("expansion", int | float), ("l1", int | float):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not abs(value) < 2**31:
                raise ValueError(f"{name} must be a number below 2**31, and d_in and k whole; got {name}={value!r}")
        if self.d_in < 1 or self.n_features < 1 or not self.l1 >= 0:
            raise ValueError(
                "an auto-encoder needs d_in and features of at least 1, and l1 >= 0; got "
                f"d_in={self.d_in}, {self.n_features} features, l1={self.l1}"
            )
        ARCHITECTURES[self.kind](self)  # refuses what it cannot be

    @property
    def n_features(self) -> int:
        """m."""
        return round(self.d_in * self.expansion)


class Architecture:
    """From pre-activations (…, m) to the code, in use and in training.

    Attributes:
        config: of the auto-encoder.
        saelens: what SAELens calls it in use.
        trained: whether `train_saes` can.
        has_threshold: whether its files hold one.
        has_k: whether k decides, in use as in training, so that its files hold it.
    """

    saelens: ClassVar[str]
    trained: ClassVar[bool] = True
    has_threshold: ClassVar[bool] = False
    has_k: ClassVar[bool] = False

    def __init__(self, config: SaeConfig):
        self.config = config

    def code(self, pre: Tensor, threshold: Tensor) -> Tensor:
        """Of any tokens (…, m), each by itself; `threshold` is (m,)."""
        return F.relu(pre)

    def code_in_training(self, pre: Tensor, threshold: Tensor) -> Tensor:
        """Of a batch (n, m); may move the threshold in place."""
        return self.code(pre, threshold)

    def penalty(self, code: Tensor) -> Tensor | float:
        """What the loss has beside the reconstruction error."""
        return 0.0


class Relu(Architecture):
    """The paper's: in training, what is active is paid for with λ Σ|f| (eq-10-2)."""

    saelens = "standard"

    def penalty(self, code: Tensor) -> Tensor:
        return self.config.l1 * code.sum() / len(code)


class JumpRelu(Architecture):
    """What exceeds the feature's threshold counts whole, and what does not counts nothing.

    Source: Rajamanoharan et al. (2024).
    """

    saelens = "jumprelu"
    trained = False
    has_threshold = True

    def code(self, pre: Tensor, threshold: Tensor) -> Tensor:
        return F.relu(pre) * (pre > threshold)


class BatchTopK(JumpRelu):
    """Trained to keep the k·n largest of a batch (eq-10-4); in use, where a token has no batch, a JumpReLU.

    Source: Bussmann, Leask & Nanda (2024).
    """

    trained = True

    def __init__(self, config: SaeConfig):
        super().__init__(config)
        _check_k(config)

    def code_in_training(self, pre: Tensor, threshold: Tensor) -> Tensor:
        return keep_largest(F.relu(pre), self.config.k, threshold)


class TopK(Architecture):
    """Of each token's code the k largest entries count.

    Source: Gao et al. (2024).
    """

    saelens = "topk"
    trained = False
    has_k = True

    def __init__(self, config: SaeConfig):
        super().__init__(config)
        _check_k(config)

    def code(self, pre: Tensor, threshold: Tensor) -> Tensor:
        largest = pre.topk(self.config.k, -1)
        return torch.zeros_like(pre).scatter(-1, largest.indices, F.relu(largest.values))


ARCHITECTURES: dict[str, type[Architecture]] = {
    "relu": Relu,
    "batchtopk": BatchTopK,
    "jumprelu": JumpRelu,
    "topk": TopK,
}


def _check_k(config: SaeConfig) -> None:
    if not 1 <= config.k <= config.n_features:
        raise ValueError(f"k must be 1 to {config.n_features}, the number of features; got {config.k}")


def keep_largest(code: Tensor, k: int, threshold: Tensor) -> Tensor:
    """A code (n, m), all but its k·n largest entries set to 0; what they exceed, averaged over calls, is the threshold.

    Args:
        code: at least 0.
        k: active features a token, on average.
        threshold: (m,), moved in place: to the first batch's floor, then towards each floor by a hundredth of the way.
    """
    n_kept = min(k * len(code), code.numel() - 1)
    floor = code.detach().flatten().topk(n_kept + 1, sorted=False).values.min()
    threshold.lerp_(floor, 0.01) if threshold[0] > 0 else threshold.fill_(floor)
    return F.threshold(code, float(floor), 0.0)
