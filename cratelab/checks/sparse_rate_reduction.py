"""Checks of the exercises of chapter 2: the rate of subspaces, rate reductions and their gradients."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cratelab.checks.grading import also, grade, predict, random, subspaces, tokens
from cratelab.checks.hunting import POSITIVE, hunt, judge, orthonormal
from cratelab.checks.watching import (
    MEASURED,
    linear_cost,
    never_calls,
    no_automatic_differentiation,
    no_library,
    no_loop,
    solves_at_most,
)

CASES = [
    (tokens(20, 8, seed=1), subspaces(4, 8, 2, seed=2), 0.5),
    (tokens(5, 6, seed=3), subspaces(2, 6, 3, seed=4), 1.4),
    (tokens(30, 9, seed=5), subspaces(2, 9, 2, seed=6), 0.2),
]
TWICE = subspaces(2, 5, 2, seed=25)[[0, 1, 0]]
EDGES = [
    (torch.zeros(4, 6, dtype=torch.float64, device="cpu"), subspaces(2, 6, 2, seed=9), 0.5),
    (tokens(1, 5, seed=10), subspaces(3, 5, 2, seed=11), 0.4),
    (tokens(3, 7, seed=12), subspaces(2, 7, 5, seed=13), 0.6),
    (tokens(8, 4, seed=14), subspaces(1, 4, 1, seed=15), 1),
    (1e-4 * tokens(9, 5, seed=16), subspaces(4, 5, 3, seed=17), 5e-5),
    (tokens(7, 6, seed=22), subspaces(2, 6, 3, seed=23), 200.0),
    (tokens(6, 5, seed=24)[[0, 0, 1, 2, 2]] * (torch.arange(5, device="cpu") > 0)[:, None], TWICE, 0.3),
]
EDGE = "tokens may be zero, tiny, equal, one or fewer than p, subspaces lines or equal, and ε tiny or far too coarse"
LABELLED = [
    (tokens(12, 5, seed=7), torch.tensor([0] * 3 + [1] * 9, device="cpu"), 0.5),
    (tokens(11, 3, seed=8), torch.tensor([2, 0, 1, 0, 2, 2, 2, 0, 2, 1, 0], device="cpu"), 1.3),
]


def change_of_reduction(function: Callable[[], dict[str, str]], reasons: bool = False) -> None:
    """Exercise 2.A: "up", "down" or "same" for six changes, against ΔR measured before and after."""
    n, d, K, eps = 400, 8, 2, 1e-4
    z = tokens(n, d, seed=1)
    U = torch.linalg.qr(random(d, d, seed=2)).Q.unflatten(1, (K, d // K)).transpose(0, 1)
    values, vectors = torch.linalg.eigh(z.T @ z)
    changed = {
        "longer": (
            3 * z,
            U,
            "at a fine precision R and each term of R^c grow by log 3 a direction, d in all on both sides",
        ),
        "blended": (torch.linalg.qr(random(n, n, seed=3)).Q @ z, U, "rates see only ZZᵀ, which stays the same"),
        "uncorrelated": (
            z @ vectors / values.sqrt() @ vectors.T,
            U,
            "R reaches the sum over subspaces when their coordinates are uncorrelated, and not before (Fischer)",
        ),
        "split": (
            z,
            torch.cat([U[:, :, :2], U[:, :, 2:]]),
            "the ceiling (d/2) log K grows with K: R^c has p in the place of d, and p is halved. The correlations "
            "within the old subspaces, which now count against it, are too weak here",
        ),
        "twice": (z, torch.cat([U, U]), "every token is coded in every subspace of the list, so R^c doubles"),
        "dropped": (
            z,
            U[:1],
            "R^c loses a term and R nothing; that ΔR grows all the same says that it is no objective for subspaces",
        ),
    }
    answer = predict(function, keys=changed, words=("up", "down", "same"))
    before = _rate(z, d, eps) - _subspace_rate(z, U, eps)
    wrong = dict.fromkeys(changed)
    for key, (moved, bases, reason) in changed.items():
        difference = _rate(moved, d, eps) - _subspace_rate(moved, bases, eps) - before
        measured = "same" if abs(difference) < 1e-3 else "up" if difference > 0 else "down"
        if answer[key] != measured:
            wrong[key] = f": you say {answer[key]!r}, measured: {measured!r} ({difference:+z.2f} nats); {reason}"
    judge(function, wrong, reasons, {key: reason for key, (*_, reason) in changed.items()})
    no_library((), why="predict on paper; the check measures")(function)
    never_calls((), MEASURED, "predict on paper; the check measures")(function)
    print(f"{function.__name__}: right, all {len(changed)}, as measured on {n} tokens in {d} dimensions.")


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 2.B: (z, U, eps) that expose the bugs of a rate of subspaces."""

    def variant(z: Tensor, U: Tensor, eps: float, width: str = "p", mean: bool = False) -> float:
        rate = _subspace_rate(z, U, eps, width=U.shape[2] if width == "p" else z.shape[1])
        return rate / len(U) if mean else rate

    bugs = {"d stands where p belongs": {"width": "d"}, "the mean over the subspaces, not their sum": {"mean": True}}
    needs = {"z": "n d", "U": "k d p", "eps": POSITIVE}
    hunt(inputs, variant, bugs, needs, lambda z, U, eps: orthonormal(U), tell=tell)


def mended_subspace_rate(
    function: Callable[[Tensor, Tensor, float], Tensor], inputs: Callable[[], list[tuple]]
) -> None:
    """Exercise 2.B: R^c of (n, d) tokens and (k, d, p) bases, against singular values, after the hunt."""
    exposing(inputs, tell=False)

    def joined(z: Tensor, U: Tensor, eps: float, width: int) -> float:
        return _rate(torch.cat([z @ basis for basis in U], dim=1), width, eps)

    mistakes = {
        "d stands where p belongs: a subspace has p dimensions over which the error spreads": lambda z, U, eps: (
            _subspace_rate(z, U, eps, width=z.shape[1])
        ),
        "the mean over the subspaces: R^c is their sum": lambda z, U, eps: _subspace_rate(z, U, eps) / len(U),
        "the mean over the subspaces, where R^c is their sum; and d stands where p belongs": lambda z, U, eps: (
            _subspace_rate(z, U, eps, width=z.shape[1]) / len(U)
        ),
        "one book for all coordinates together: take the logarithm of each subspace's determinant, then add": (
            lambda z, U, eps: joined(z, U, eps, U.shape[2])
        ),
        "one book for all coordinates together, and d where p belongs": lambda z, U, eps: joined(z, U, eps, z.shape[1]),
        "d/K stands where p belongs: here the subspaces need not fill the space": lambda z, U, eps: _subspace_rate(
            z, U, eps, width=z.shape[1] / len(U)
        ),
        "the factor ½ is lost": lambda z, U, eps: 2 * _subspace_rate(z, U, eps),
    }
    rules = [no_library(CASES[0]), also(EDGE, *EDGES, oracle=_subspace_rate)]
    grade(function, CASES, _subspace_rate, "sums over singular values", mistakes, rules=rules)


def label_gradient(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 2.C: ∇ΔR with labels, (n, d), against automatic differentiation."""

    def gradient(
        z: Tensor, group: Tensor, eps: float, weighted: bool = True, whole: float = 1, sign: float = -1
    ) -> Tensor:
        def objective(z: Tensor) -> Tensor:
            rate = whole * _slogdet_rate(z, z.shape[1], eps)
            for j in group.unique():
                part = z[group == j]
                rate = rate + sign * (len(part) / len(z) if weighted else 1) * _slogdet_rate(part, z.shape[1], eps)
            return rate

        return _gradient(objective, z)

    def same_n(z: Tensor, group: Tensor, eps: float) -> Tensor:
        """With n for n_j inside each part's rate, weighted by 1: the factor in front is right."""

        def objective(z: Tensor) -> Tensor:
            parts = [z[group == j] for j in group.unique()]
            rates = [_slogdet_rate(part, z.shape[1], eps * (len(z) / len(part)) ** 0.5) for part in parts]
            return _slogdet_rate(z, z.shape[1], eps) - sum(rates)

        return _gradient(objective, z)

    mistakes = {
        "the weights n_j/n of the groups are missing: with them, n_j cancels in front of each part": (
            lambda z, group, eps: gradient(z, group, eps, weighted=False)
        ),
        "inside the inverse of a part stands n_j, the number of its own tokens; only in front does it cancel": same_n,
        "the parts are added: they are what ΔR subtracts": lambda z, group, eps: gradient(z, group, eps, sign=1),
        "the parts are missing: this is ∇R of all tokens": lambda z, group, eps: gradient(z, group, eps, sign=0),
        "∇R of all tokens is missing: these are only the parts": lambda z, group, eps: gradient(z, group, eps, whole=0),
        "the sign: this is the way down": lambda z, group, eps: -gradient(z, group, eps),
        "twice what is right: Z stands twice in ZZᵀ, and that uses up the ½": lambda z, group, eps: (
            2 * gradient(z, group, eps)
        ),
    }
    gaps = [
        (tokens(9, 4, seed=9), torch.tensor([5, 2, 2, 9, 5, 5, 9, 9, 2], device="cpu"), 0.4),
        (tokens(7, 3, seed=10), torch.tensor([-1, 4, 0, 4, 4, -1, 0], device="cpu"), 0.7),
        (tokens(9, 3, seed=13), torch.tensor([-1, 1, 257, 1, 257, -1, 1, -257, -257], device="cpu"), 0.5),
    ]
    few = [
        (tokens(6, 4, seed=11), torch.tensor([0, 1, 1, 1, 2, 1], device="cpu"), 0.4),
        (tokens(5, 3, seed=12), torch.zeros(5, dtype=torch.int64, device="cpu"), 0.7),
    ]
    rules = [
        no_automatic_differentiation(LABELLED[0]),
        also("labels may have gaps or be negative: go through those that occur", *gaps, oracle=gradient),
        also("a group may have one token, or all of them", *few, oracle=gradient),
    ]
    grade(function, LABELLED, gradient, "automatic differentiation", mistakes, rules=rules)


def subspace_gradient(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 2.D: ∇R^c, (n, d), against automatic differentiation."""

    def gradient(z: Tensor, U: Tensor, eps: float, width: int | None = None) -> Tensor:
        return _gradient(lambda z: sum(_slogdet_rate(z @ basis, width or U.shape[2], eps) for basis in U), z)

    def spectral(z: Tensor, U: Tensor, eps: float, power: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """s Σ_k f(I + s W_kW_kᵀ) W_k U_kᵀ for a function of the eigenvalues; the gradient has f(x) = 1/x."""
        scale, total = U.shape[2] / (len(z) * eps**2), torch.zeros_like(z)
        for basis in U:
            w = z @ basis
            values, vectors = np.linalg.eigh(np.eye(len(z)) + scale * (w @ w.T).numpy())
            total += torch.from_numpy(vectors * power(values) @ vectors.T) @ w @ basis.T
        return scale * total

    mistakes = {
        "twice what is right: Z stands twice in ZZᵀ, and that uses up the ½": lambda z, U, eps: 2 * gradient(z, U, eps),
        "half of what is right: Z stands twice in ZZᵀ, and that uses up the ½": lambda z, U, eps: (
            gradient(z, U, eps) / 2
        ),
        "d stands where p belongs": lambda z, U, eps: gradient(z, U, eps, width=z.shape[1]),
        "the mean over the subspaces: R^c is their sum": lambda z, U, eps: gradient(z, U, eps) / len(U),
        "the matrix is not inverted": lambda z, U, eps: spectral(z, U, eps, lambda x: x),
        "there is no inverse: this is the gradient near Z = 0 only": lambda z, U, eps: spectral(
            z, U, eps, lambda x: x**0
        ),
        "I − sWWᵀ stands for the inverse of I + sWWᵀ: that is chapter 3's approximation": lambda z, U, eps: spectral(
            z, U, eps, lambda x: 2 - x
        ),
        "the factor s = p/(nε²) in front is lost": lambda z, U, eps: gradient(z, U, eps) * len(z) * eps**2 / U.shape[2],
        "the sign: this is the step down": lambda z, U, eps: -gradient(z, U, eps),
    }
    z, U = tokens(40, 9, seed=18), subspaces(4, 9, 2, seed=19)
    rules = [
        no_automatic_differentiation(CASES[0]),
        no_library(CASES[0]),
        also(EDGE, *EDGES, oracle=gradient),
        no_loop((z, U[:2], 0.5), (z, U, 0.5), "subspaces"),
        solves_at_most(2, (z, U, 0.5), "p×p is enough, since W(I + sWᵀW) = (I + sWWᵀ)W"),
        linear_cost(
            (tokens(200, 9, seed=20), U, 0.5),
            (tokens(400, 9, seed=21), U, 0.5),
            "solve with p×p matrices, since W(I + sWᵀW) = (I + sWWᵀ)W",
        ),
    ]
    grade(function, CASES, gradient, "automatic differentiation", mistakes, rules=rules)


def _gradient(objective: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(objective(z), z)[0]


def _slogdet_rate(w: Tensor, width: int, eps: float) -> Tensor:
    """½ logdet(I + width/(nε²) wwᵀ), on the n×n matrix."""
    n = len(w)
    return torch.linalg.slogdet(torch.eye(n, dtype=w.dtype, device=w.device) + width / (n * eps**2) * w @ w.T)[1] / 2


def _rate(w: Tensor, width: float, eps: float) -> float:
    values = np.linalg.svd(w.numpy(), compute_uv=False)
    return float(np.log1p(width / (len(w) * eps**2) * values**2).sum() / 2)


def _subspace_rate(z: Tensor, U: Tensor, eps: float, width: float | None = None) -> float:
    return sum(_rate(z @ basis, width or U.shape[2], eps) for basis in U)
