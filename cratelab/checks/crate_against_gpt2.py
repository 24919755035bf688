"""Checks of the exercises of chapter 9: a network in two numbers, intervals over seeds, what neurons tell."""

from collections.abc import Callable
from functools import partial
from itertools import permutations, product
from math import sqrt
from statistics import fmean, pstdev, stdev, variance

import numpy as np
import torch
from scipy.stats import norm, ttest_ind, ttest_rel
from scipy.stats import t as student
from torch import Tensor

from cratelab.checks import watching
from cratelab.checks.grading import also, grade, random


def _network(n_layers: int, h: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores (n_layers, h), and which of them are defined: the fewer the later the layer, two of them at least."""
    scores = 0.5 + 0.2 * random(n_layers, h, seed=seed) - 0.1 * torch.arange(n_layers, device="cpu")[:, None]
    live = torch.linspace(h, 2, n_layers, device="cpu").long()
    scores[:, -1] = scores[0, 0] = 0  # a score like any other
    return scores, torch.arange(h, device="cpu") >= h - live[:, None]


NETWORKS = [
    (*_network(n_layers, h, seed=10 * n_layers + drop + 2 * last), last, drop)
    for n_layers, h in ((3, 8), (6, 12))
    for last in (True, False)
    for drop in (True, False)
]
ONE_LAYER = [(*_network(1, 5, seed=7), True, True), (*_network(2, 6, seed=8), False, False)]
SEEDS = [
    (60 + 4 * random(n, seed=n) + shared, 57 + 3 * random(n, seed=n + 10) + shared)
    for n in (2, 3, 5, 12)
    for shared in [5 * random(n, seed=n + 20)]
]
SEEDS.append((0.6 + 0.001 * random(4, seed=4), 0.61 + 0.002 * random(4, seed=14)))  # shares, and GPT-2 leads


def _all_resamples(n_layers: int, h: int) -> Tensor:
    """Every way to draw h neurons of each layer with replacement: (h^(n_layers h), n_layers, h)."""
    ways = torch.tensor(list(product(range(h), repeat=n_layers * h)), device="cpu")
    return ways.unflatten(1, (n_layers, h))


RESAMPLED = [
    (0.5 + random(n_layers, h, seed=h) + torch.arange(n_layers, device="cpu")[:, None], _all_resamples(n_layers, h))
    for n_layers, h in ((1, 4), (2, 3), (3, 2))
]
RETRAINED = [
    (0.4 + spread * random(n, 1, seed=n) + 0.2 * random(n, h, seed=h),)
    for n, h, spread in ((3, 6, 0.5), (5, 4, 0.2), (2, 9, 0.3), (4, 8, 0))  # the last estimate is negative
]


def mean_and_variance(function: Callable[[Tensor, Tensor, bool, bool], tuple[float, float]]) -> None:
    """Exercise 9.A: mean and variance over layers, against squared differences between all pairs of layers."""

    def layers(scores: Tensor, defined: Tensor, last: bool, drop: bool, bug: dict) -> list[float]:
        drop = bug.get("drop", drop)
        means = []
        for row, there in zip(scores.tolist(), defined.tolist(), strict=True):
            values = [score for score, yes in zip(row, there, strict=True) if yes or bug.get("as_they_stand")]
            means.append(sum(values) / (len(values) if drop else len(row)))
        ends = {"last": slice(None, -1), "first": slice(1, None)}
        return means if bug.get("last", last) else means[ends[bug.get("end", "last")]]

    def by_pairs(*case: object, **bug: object) -> tuple[float, float]:
        S = [100 * mean for mean in layers(*case, bug)]
        return sum(S) / len(S), sum((a - b) ** 2 for a in S for b in S) / (2 * len(S) ** 2)

    def then(change: Callable[[list[float]], tuple], *case: object) -> tuple:
        return change([100 * mean for mean in layers(*case, {})])

    def weighted(scores: Tensor, defined: Tensor, last: bool, drop: bool) -> tuple[float, float]:
        stop = None if last else -1
        kept = scores[:stop][defined[:stop]]
        mean = kept.mean() if drop else kept.sum() / defined[:stop].numel()
        return 100 * float(mean), by_pairs(scores, defined, last, drop)[1]

    def over_neurons(scores: Tensor, defined: Tensor, last: bool, drop: bool) -> tuple[float, float]:
        stop = None if last else -1
        values = scores[:stop][defined[:stop]] if drop else (scores * defined)[:stop].flatten()
        return by_pairs(scores, defined, last, drop)[0], float(np.var(100 * values.numpy()))

    mistakes = {
        "this is the sample variance: (9.1) divides by L, not by L − 1": partial(
            then, lambda S: (fmean(S), variance(S))
        ),
        "the mean is taken over all neurons at once: layers with fewer live neurons must not count for less": weighted,
        "the variance is one of neurons: it is that of the layers' means": over_neurons,
        "this is the standard deviation: the variance is its square": partial(then, lambda S: (fmean(S), pstdev(S))),
        "the factor 100 is missing": partial(then, lambda S: (fmean(S) / 100, pstdev(S) ** 2 / 100**2)),
        "the variance is 100 times too small: the factor 100 enters it squared": partial(
            then, lambda S: (fmean(S), pstdev(S) ** 2 / 100)
        ),
        "neurons without a score always count as zero: with `drop` they leave the mean": partial(by_pairs, drop=False),
        "neurons without a score are always dropped: without `drop` they count as zero": partial(by_pairs, drop=True),
        "entries that are not scores are averaged: look at `defined`": partial(
            by_pairs, as_they_stand=True, drop=False
        ),
        "the last layer is always in: without `last` it is left out": partial(by_pairs, last=True),
        "the last layer is always out: with `last` it counts": partial(by_pairs, last=False),
        "without `last` the first layer is left out instead": partial(by_pairs, end="first"),
    }
    rules = [also("one layer that counts has a mean, and the variance 0", *ONE_LAYER, oracle=by_pairs)]
    for nothing in (torch.nan, torch.inf):
        but = f"{nothing} can stand where a neuron has no score, and 0 · {nothing} is NaN: use torch.where"
        cases = [(scores.masked_fill(~defined, nothing), defined, *how) for scores, defined, *how in NETWORKS]
        rules.append(also(but, *cases, oracle=by_pairs))
    grade(function, NETWORKS, by_pairs, "squared differences between all pairs of layers", mistakes, rules=rules)


def paired_interval(function: Callable[[Tensor, Tensor], tuple[float, float]]) -> None:
    """Exercise 9.B: the 95 % interval of CRATE's lead over seeds, against scipy's paired t test."""

    def scipy(crate: Tensor, gpt2: Tensor, level: float = 0.95) -> tuple[float, float]:
        return tuple(ttest_rel(crate.numpy(), gpt2.numpy()).confidence_interval(level))

    def unpaired(equal: bool, crate: Tensor, gpt2: Tensor) -> tuple[float, float]:
        return tuple(ttest_ind(crate.numpy(), gpt2.numpy(), equal_var=equal).confidence_interval(0.95))

    def half(of: Callable[[list[float], int], float], crate: Tensor, gpt2: Tensor) -> tuple[float, float]:
        d = (crate - gpt2).tolist()
        return fmean(d) - of(d, len(d)), fmean(d) + of(d, len(d))

    def quantile(n: int, off: int = 1) -> float:
        return student.ppf(0.975, n - off)

    alone = "seeds are taken for unrelated: both models share each seed's text, so form the differences seed by seed"
    mistakes = {
        alone: partial(unpaired, False),
        f"{alone} (and a pooled variance does not help)": partial(unpaired, True),
        "1.96 belongs to a normal distribution with a known spread: from so few seeds use Student's t": partial(
            half, lambda d, n: norm.ppf(0.975) * stdev(d) / sqrt(n)
        ),
        "1.96 belongs to a known spread: from so few seeds use Student's t": partial(
            half, lambda d, n: 1.96 * stdev(d) / sqrt(n)
        ),
        "divided by n: the spread of a mean falls with √n": partial(half, lambda d, n: quantile(n) * stdev(d) / n),
        "not divided by √n: this is where another seed would fall, not the mean": partial(
            half, lambda d, n: quantile(n) * stdev(d)
        ),
        "the standard deviation divides by n: it is n − 1, for the mean was taken from the same differences": partial(
            half, lambda d, n: quantile(n) * pstdev(d) / sqrt(n)
        ),
        "Student's t has n degrees of freedom here: one went into the mean, n − 1 are left": partial(
            half, lambda d, n: quantile(n, 0) * stdev(d) / sqrt(n)
        ),
        "the quantile at 0.95 leaves 5 % out on each side: take that at 0.975": partial(scipy, level=0.9),
        "this is GPT-2's lead: CRATE's minus GPT-2's is asked for": lambda crate, gpt2: scipy(gpt2, crate),
        "low and high are exchanged": lambda crate, gpt2: scipy(crate, gpt2)[::-1],
    }
    rule = watching.never_calls(SEEDS[0], ("*.ttest_*",), "it is the check's, form the interval yourself")
    grade(function, SEEDS, scipy, "scipy's paired t test", mistakes, rules=[rule])


def bootstrap_error(function: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 9.C: the spread of a network's mean over all resamples there are, against its closed form."""

    def exact(scores: Tensor, _: Tensor) -> float:
        """Layers are drawn independently, and a mean of h draws has a variance of 1/h of that of a draw."""
        return sqrt(sum(pstdev(row) ** 2 / len(row) for row in scores.tolist())) / len(scores)

    def first_only(scores: Tensor, _: Tensor) -> float:
        return pstdev(scores[0].tolist()) / sqrt(scores.numel())

    def together(scores: Tensor, _: Tensor) -> float:
        return pstdev(scores.mean(0).tolist()) / sqrt(scores.shape[1])

    def of_layers(scores: Tensor, picks: Tensor) -> float:
        """All layers' means of all resamples in one heap."""
        L, h = scores.shape
        means = scores.mean(1).tolist()
        return sqrt(pstdev(means) ** 2 + sum(pstdev(row) ** 2 / h for row in scores.tolist()) / L)

    def drawn(scores: Tensor, _: Tensor) -> float:
        return pstdev(scores.flatten().tolist())

    mistakes = {
        "divided by √B: the spread of the resampled means is already the standard error": lambda s, p: (
            exact(s, p) / sqrt(len(p))
        ),
        "this is the variance: the standard error is its root": lambda s, p: exact(s, p) ** 2,
        "divided by B − 1: these are all the resamples there are, so divide by B": lambda s, p: (
            exact(s, p) * sqrt(len(p) / (len(p) - 1))
        ),
        "all neurons are drawn from the first layer: `picks` numbers them within their own": first_only,
        "all layers use the picks of the first: each layer is drawn on its own": together,
        "the spread of the layers' means: average over the layers of a resample first": of_layers,
        "the spread of single neurons: average the neurons of a resample first": drawn,
        "half the width of a 95 % interval: the standard error itself is asked for": lambda s, p: 1.96 * exact(s, p),
    }

    def one_by_one(scores: Tensor, picks: Tensor) -> float:
        layers = range(len(scores))
        return pstdev(fmean(fmean(scores[layer, b[layer]].tolist()) for layer in layers) for b in picks)

    few = [(scores, picks[3 :: len(picks) // 7].repeat_interleave(2, 0)[:-1]) for scores, picks in RESAMPLED]
    but = "these are some of the resamples that there are. Are just these picks used, each as often as it stands there?"
    grade(function, RESAMPLED, exact, "the closed form", mistakes, rules=[also(but, *few, oracle=one_by_one)])


def training_variance(function: Callable[[Tensor], float]) -> None:
    """Exercise 9.D: the variance between trainings, against products of pairs of neurons."""

    def by_pairs(scores: Tensor) -> float:
        """Two neurons of one network share its luck, and two of different networks share nothing."""
        rows = scores.tolist()
        same = fmean(a * b for row in rows for a, b in permutations(row, 2))
        return same - fmean(a * b for one, other in permutations(rows, 2) for a in one for b in other)

    def parts(scores: Tensor) -> tuple[list[float], float, int]:
        return scores.mean(1).tolist(), fmean(variance(row) for row in scores.tolist()), scores.shape[1]

    def variant(combine: Callable[[list[float], float, int], float], scores: Tensor) -> float:
        return combine(*parts(scores))

    mistakes = {
        "nothing is taken off: the means scatter also because their neurons are finitely many (9.2)": partial(
            variant, lambda means, v, h: variance(means)
        ),
        "the variance of one neuron is taken off: a mean of h neurons has 1/h of it": partial(
            variant, lambda means, v, h: variance(means) - v
        ),
        "1/(n h) of the neurons' variance is taken off: each mean is over the h neurons of one network": lambda s: (
            variance(parts(s)[0]) - parts(s)[1] / s.numel()
        ),
        "the neurons' part is added: (9.2) has to be solved for the training's": partial(
            variant, lambda means, v, h: variance(means) + v / h
        ),
        "the variance over seeds divides by n: it is n − 1": partial(
            variant, lambda means, v, h: pstdev(means) ** 2 - v / h
        ),
        "the variance over neurons divides by h: it is h − 1": partial(
            variant, lambda means, v, h: variance(means) - v * (h - 1) / h / h
        ),
        "both variances divide by the number of values: it is one less": partial(
            variant, lambda means, v, h: pstdev(means) ** 2 - v * (h - 1) / h / h
        ),
        "the neurons' variance is taken over all networks together: it is that within each": lambda s: (
            variance(parts(s)[0]) - variance(s.flatten().tolist()) / s.shape[1]
        ),
        "this is the bootstrap's part, that of the neurons": partial(variant, lambda means, v, h: v / h),
        "cut off at 0: an unbiased estimate of a small variance is sometimes negative": lambda s: max(0, by_pairs(s)),
    }
    grade(function, RETRAINED, by_pairs, "products of pairs of neurons", mistakes)
