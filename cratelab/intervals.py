"""How sure a mean is: intervals over seeds and over the neurons of one network; and what many tests at once allow."""

import math
from collections.abc import Sequence
from statistics import stdev

import numpy as np
from torch import Tensor

from cratelab.arguments import check_seed, check_whole


def interval(values: list[float]) -> float | None:
    """Half-width of the 95 % interval of the mean by Student's t (eq-09-3).

    None with fewer than two values, NaN with one that is not finite.
    """
    from scipy.stats import t

    n = len(values)
    if not all(map(math.isfinite, values)):
        return math.nan
    return None if n < 2 else float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5


def interval_over_neurons(scores: Tensor, n_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a network's mean score × 100: neurons are drawn anew within each layer.

    It says how sure the mean of *this* network is, and nothing of what another training would give (eq-09-2).

    Args:
        scores: (l, h) of h neurons in each of l layers.
        n_resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: there is no neuron or no resample, or `seed` is out of range.
    """
    check_whole("n_resamples", n_resamples)
    check_seed(seed)
    if not scores.numel():
        raise ValueError(f"interval_over_neurons needs at least one neuron; got scores of shape {tuple(scores.shape)}")
    draw, (n_layers, h) = np.random.default_rng(seed), scores.shape
    means = np.zeros(n_resamples)
    # scipy.stats.bootstrap gives the same digits, but holds every layer's draws at once and refuses a single neuron.
    for layer in scores.cpu().numpy():
        means += 100 * layer[draw.integers(h, size=(n_resamples, h))].mean(1) / n_layers
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, adjusted so that one false finding among all is as unlikely as each says.

    The smallest of m is multiplied by m, the next by m − 1 and so on, none becomes smaller than the one before it, and
    none larger than 1. No independence is assumed.

    Raises:
        ValueError: a p value is not from 0 to 1.

    Source: Holm (1979).
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p values must be from 0 to 1; got {list(p_values)}")
    order, adjusted, least = sorted(range(len(p_values)), key=lambda i: p_values[i]), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = adjusted[i] = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def equivalence(values: list[float], margin: float) -> float:
    """p value of the claim that the mean lies within ±margin of zero: two one-sided t tests, of which the worse counts.

    Raises:
        ValueError: fewer than two values, or `margin` is not positive.

    Source: Schuirmann (1987).
    """
    from scipy.stats import ttest_1samp

    if len(values) < 2 or not margin > 0:
        raise ValueError(f"equivalence needs two values or more and a margin above 0; got {len(values)} and {margin}")
    above, below = ttest_1samp(values, -margin, alternative="greater"), ttest_1samp(values, margin, alternative="less")
    return float(np.maximum(above.pvalue, below.pvalue))  # NaN if either is
