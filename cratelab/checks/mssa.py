"""Checks of the exercises of chapter 3: from the gradient of R^c to causal subspace self-attention."""

from collections.abc import Callable
from functools import partial
from math import log

import numpy as np
import torch
from torch import Tensor

from cratelab.checks.grading import also, grade, predict, random, subspaces, tokens, unmended
from cratelab.checks.hunting import hunt, judge, orthonormal
from cratelab.checks.watching import linear_cost, never_calls, no_library, no_loop, no_search

ATTENTION = [
    (tokens(7, 6, seed=1), subspaces(3, 6, 2, seed=2)),
    (tokens(5, 4, seed=3), subspaces(2, 4, 3, seed=4)),
    (0.5 * tokens(9, 8, seed=5), subspaces(1, 8, 4, seed=6)),
]
STEPS = [
    (0.3 * tokens(12, 6, seed=1), subspaces(2, 6, 2, seed=2), 0.4, 0.5),
    (tokens(5, 8, seed=3), random(3, 8, 2, seed=4), 2.5, 1.4),
    (0.6 * tokens(20, 7, seed=5), subspaces(4, 7, 3, seed=6), 1.3, 0.8),
]
LAYERS = [
    (random(2, 5, 12, seed=1), random(12, 12, seed=2), random(12, 12, seed=3), random(12, seed=4), 3),
    (0.7 * random(1, 6, 8, seed=5), random(8, 8, seed=6), random(8, 8, seed=7), random(8, seed=8), 4),
    (0.3 * random(3, 4, 6, seed=9), random(6, 6, seed=10), random(6, 6, seed=11), random(6, seed=12), 2),
]
STRETCHES = [
    (tokens(12, 6, seed=1), subspaces(2, 6, 3, seed=2), 0.5, 1, 0.01),
    (tokens(30, 9, seed=3), subspaces(3, 9, 2, seed=4), 0.8, 3, 0.1),
    (0.2 * tokens(6, 8, seed=5), random(2, 8, 5, seed=6), 1.5, 2, 0.3),
]


ZEROS = torch.zeros(4, 6, dtype=torch.float64, device="cpu")


def exponents(function: Callable[[], dict[str, float]], reasons: bool = False) -> None:
    """Exercise 3.A: powers with which the step and its stand-ins grow with the tokens, against measured slopes."""
    z, U = tokens(40, 8, seed=1), subspaces(2, 8, 4, seed=2)
    maps = {
        "exact_small": (_gradient, z, 1e-4, "near zero the inverse is I, and what is left is sΣUₖWₖ"),
        "exact_large": (_gradient, z, 1e4, "the inverse wins: each direction has σ/(1 + sσ²), which falls like 1/σ"),
        "gram": (_gram, z, 1.0, "three factors Wₖ are multiplied, whatever their size"),
        "softmax_small": (_softmax, z, 1e-4, "equal weights give back the mean token, which is as long as the tokens"),
        "softmax_centred": (
            _softmax,
            z - z.mean(0),
            1e-3,
            "without a mean the first term is Cwᵢ/√p, and the covariance C has two factors Wₖ of its own",
        ),
        "softmax_large": (_softmax, z, 1e4, "one key takes all the weight, and its token comes back at full length"),
    }
    answer = predict(function, keys=maps, numbers=True)
    wrong = dict.fromkeys(maps)
    for key, (attention, at, scale, reason) in maps.items():
        measured = log(attention(2 * scale * at, U).norm() / attention(scale * at, U).norm()) / log(2)
        if not abs(answer[key] - measured) <= 0.05:  # NaN is not right
            wrong[key] = f": you say {answer[key]:zg}, measured: {measured:z.2f}; {reason}"
    judge(function, wrong, reasons, {key: reason for key, (*_, reason) in maps.items()})
    no_library((), why="predict on paper; the check measures")(function)
    print(f"{function.__name__}: right, all {len(maps)}, as measured on {len(z)} tokens that become twice as long.")


BUGS = {
    "softmax over queries instead of keys: what sums to 1 for each query?": {"over": "queries"},
    "the scale is 1/√d instead of 1/√p": {"width": "d"},
    "the values are whole tokens: a head returns what it sees of them, UₖUₖᵀz": {"whole": True},
}


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 3.B: (z, U) that expose the bugs of an MSSA."""
    hunt(inputs, _mssa, BUGS, {"z": "n d", "U": "k d p"}, _few, tell=tell)


def _few(z: Tensor, U: Tensor) -> str | None:
    return "at most 50 tokens and 10 subspaces, please" if len(z) > 50 or len(U) > 10 else orthonormal(U)


def mended_mssa(function: Callable[[Tensor, Tensor], Tensor], inputs: Callable[[], list[tuple]]) -> None:
    """Exercise 3.B: MSSA of (n, d) tokens and (k, d, p) bases, against a sum written token by token, after the hunt."""
    exposing(inputs, tell=False)
    mistakes = unmended(_mssa, BUGS)
    mistakes["there is no 1/√p before the softmax"] = partial(_mssa, width="none")
    mistakes["the scale is 1/p: the root is missing"] = partial(_mssa, width="no root")
    mistakes["the mean over the heads: MSSA is their sum"] = lambda z, U: _mssa(z, U) / len(U)
    edges = [
        (ZEROS, subspaces(2, 6, 3, seed=7)),
        (tokens(1, 5, seed=8), subspaces(3, 5, 2, seed=9)),
        (tokens(6, 7, seed=10), subspaces(5, 7, 1, seed=11)),
        (3 * tokens(6, 5, seed=12) - 2, subspaces(2, 5, 4, seed=13)),
        (60 * tokens(6, 5, seed=14), subspaces(2, 5, 3, seed=15)),
        (tokens(4, 6, seed=16)[[0, 0, 1, 2, 3]], subspaces(2, 6, 2, seed=17)[[0, 1, 0]]),
    ]
    rules = [
        no_library(ATTENTION[0]),
        also("tokens may be zero, one, equal, or very long, and subspaces lines, or equal", *edges, oracle=_mssa),
    ]
    grade(function, ATTENTION, _mssa, "a sum written token by token", mistakes, rules=rules)


def first_order_step(function: Callable[[Tensor, Tensor, float, float], Tensor]) -> None:
    """Exercise 3.C: the first-order step of (n, d) tokens, against automatic differentiation; then its cost."""

    mistakes = {
        "the sign of the second term: 1/(1 + x) = 1 − x + …, and a step down subtracts it": partial(
            _first_order, attend=-1
        ),
        "one s is missing: the gradient has a factor s, and so has the first-order term of the series": (
            partial(_first_order, power=1)
        ),
        "Z stands where ΣUₖUₖᵀZ belongs: these subspaces do not fill the space": partial(_first_order, fill=True),
        "the attended part is missing: this is order 0": partial(_first_order, attend=0),
        "the shrinking part is missing: order 0 of the series counts, too": partial(_first_order, shrink=0),
        "d stands where p belongs in s": partial(_first_order, width=1),
        "this is the gradient: the step is Z − κ times it": lambda z, U, step_size, eps: (
            -_first_order(z, U, 1.0, eps, start=0)
        ),
        "the step size κ is missing": lambda z, U, step_size, eps: _first_order(z, U, 1.0, eps),
        "κ is missing from the attended part: it multiplies the whole gradient": lambda z, U, step_size, eps: (
            _first_order(z, U, step_size, eps, attend=1 / step_size)
        ),
        "the sign: this step goes up": lambda z, U, step_size, eps: _first_order(z, U, -step_size, eps),
        "this is the exact step: cut the series after its first order": lambda z, U, step_size, eps: (
            z - step_size * _gradient(z, U, eps)
        ),
        "the attended part has a factor 2: the series is of the inverse, not of the logarithm": (
            partial(_first_order, attend=2)
        ),
    }
    U = subspaces(2, 16, 4, seed=7)
    edges = [
        (ZEROS, subspaces(2, 6, 3, seed=9), 0.5, 0.5),
        (tokens(1, 5, seed=10), subspaces(3, 5, 2, seed=11), 0.3, 0.9),
        (tokens(3, 7, seed=12), subspaces(1, 7, 5, seed=13), 1, 2),
        (1e-4 * tokens(9, 5, seed=14), random(4, 5, 1, seed=15), 0.7, 2e-4),
    ]
    rules = [
        no_library(STEPS[0]),
        also(
            "tokens may be zero or tiny, one or fewer than p, and subspaces one, or lines", *edges, oracle=_series_step
        ),
        linear_cost(
            (0.1 * random(200, 16, seed=8), U, 0.5, 0.5),
            (0.1 * random(400, 16, seed=8), U, 0.5, 0.5),
            "it compares tokens with tokens. (WᵀW) is n×n, (WWᵀ) is p×p: which product comes first is yours to choose",
        ),
    ]
    grade(function, STEPS, _series_step, "the gradient of the logarithm's series", mistakes, rules=rules)


def _series_step(z: Tensor, U: Tensor, step_size: float, eps: float) -> Tensor:
    """Down the gradient of ½ Σ (s tr G − s²/2 tr G²), the first two terms of ½ Σ log det(I + sG)."""
    s, moved = U.shape[2] / (len(z) * eps**2), z.clone().requires_grad_()
    grams = [moved @ basis @ basis.T @ moved.T for basis in U]
    series = sum(s * gram.trace() - s**2 / 2 * gram.square().sum() for gram in grams) / 2
    return z - step_size * torch.autograd.grad(series, moved)[0]


def _first_order(
    z: Tensor,
    U: Tensor,
    step_size: float,
    eps: float,
    start: float = 1,
    shrink: float = 1,
    attend: float = 1,
    power: int = 2,
    width: int = 2,
    fill: bool = False,
) -> Tensor:
    s = U.shape[1 if width == 1 else 2] / (len(z) * eps**2)
    projections = [basis @ basis.T for basis in U]
    shrunk = z if fill else sum(z @ P for P in projections)
    attended = sum(z @ P @ z.T @ z @ P for P in projections)
    return start * z - step_size * (shrink * s * shrunk - attend * s**power * attended)


def causal_layer(function: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 3.D: the layer on (b, n, d) tokens, against sums written token by token."""
    mistakes = {
        "the mask leaks the future: token i sees the keys j ≤ i only": partial(_layer, mask="none"),
        "the mask is the wrong way round: a token sees itself and later ones": partial(_layer, mask="past"),
        "the mask leaks the future: a score of 0 still weighs e⁰ = 1; what weighs nothing is −∞": (
            partial(_layer, mask="zero")
        ),
        "the mask hides a token from itself: token i sees the keys j ≤ i": partial(_layer, mask="strict"),
        "masked after the softmax: the weights that are left no longer sum to 1": partial(_layer, mask="after"),
        "softmax over queries instead of keys": partial(_layer, over="queries"),
        "the scale is 1/√d instead of 1/√p": partial(_layer, width="d"),
        "there is no 1/√p before the softmax": partial(_layer, width="none"),
        "the heads are interleaved, (p k) for (k p): head k has the rows kp to (k+1)p": (
            partial(_layer, split="p k", join="p k")
        ),
        "the heads are interleaved on the way in, (p k) for (k p)": partial(_layer, split="p k"),
        "the heads are interleaved on the way out, (p k) for (k p)": partial(_layer, join="p k"),
        "the heads are cut across tokens, in and out: reshape to (b, n, k, p), then swap the axes n and k": (
            partial(_layer, split="across", join="across")
        ),
        "the heads are cut across tokens: reshape to (b, n, k, p), then swap the axes n and k": (
            partial(_layer, split="across")
        ),
        "the heads are joined across tokens: swap the axes n and k back before the reshape to (b, n, d)": (
            partial(_layer, join="across")
        ),
        "the projection is transposed: tokens are rows, so it is z @ projection.T": lambda z, projection, *rest: _layer(
            z, projection.T, *rest
        ),
        "the output matrix is transposed: tokens are rows, so it is … @ output.T": (
            lambda z, projection, output, *rest: _layer(z, projection, output.T, *rest)
        ),
        "both matrices are transposed: tokens are rows, so it is z @ projection.T": (
            lambda z, projection, output, *rest: _layer(z, projection.T, output.T, *rest)
        ),
        "the bias is missing": lambda z, projection, output, bias, k: _layer(z, projection, output, 0 * bias, k),
        "the Uₖ lift the heads: the layer has a learned output matrix instead": lambda z, projection, output, bias, k: (
            _layer(z, projection, projection.T, bias, k)
        ),
        "the tokens are added: the block does that, not the layer": lambda z, *rest: z + _layer(z, *rest),
    }
    edges = [
        (random(2, 1, 6, seed=13), random(6, 6, seed=14), random(6, 6, seed=15), random(6, seed=16), 2),
        (random(2, 4, 9, seed=17), random(9, 9, seed=18), random(9, 9, seed=19), random(9, seed=20), 3),
        (random(3, 5, 4, seed=21), random(4, 4, seed=22), random(4, 4, seed=23), random(4, seed=24), 1),
        (random(1, 5, 4, seed=25), random(4, 4, seed=26), random(4, 4, seed=27), random(4, seed=28), 4),
        (1000 * random(2, 5, 6, seed=35), random(6, 6, seed=36), random(6, 6, seed=37), random(6, seed=38), 2),
    ]
    few = (random(2, 3, 24, seed=29), random(24, 24, seed=30), random(24, 24, seed=31), random(24, seed=32), 2)
    fused = ["*.scaled_dot_product_attention", "*.multi_head_attention_forward", "torch.nn.modules.activation.*"]
    rules = [
        no_library(few),
        never_calls(few, fused, "write the softmax yourself"),
        also(
            "a text may have one token, or very long ones, a layer one head, or as many as dimensions",
            *edges,
            oracle=_layer,
        ),
        no_loop(few, (random(6, 3, 24, seed=33), *few[1:]), "texts"),
        no_loop(few, (random(2, 9, 24, seed=34), *few[1:]), "tokens"),
        no_loop(few, (*few[:4], 8), "heads"),
    ]
    grade(function, LAYERS, _layer, "sums written token by token", mistakes, rules=rules)


def largest_stretch(function: Callable[[Tensor, Tensor, float, int, float], float]) -> None:
    """Exercise 3.E: how far tokens may be stretched until the series errs by a tolerance, against bisection."""

    mistakes = {
        "the error is absolute: relative to 1/(1 + x) it is larger": _absolute,
        "the norm is not squared: the strength is s‖Wₖ‖²": partial(_from_strengths, square=1),
        "the norm is not squared, and there is no root: the strength is s‖Wₖ‖²": partial(
            _from_strengths, square=1, root=1
        ),
        "the square root is missing: the strength is quadratic in the tokens": partial(_from_strengths, root=1),
        "after order m the error starts with x to the power m + 1, not m": partial(_from_strengths, more=0),
        "this is where the series begins to diverge: at a given tolerance it must stop earlier": (
            lambda z, U, eps, order, tolerance: _from_strengths(z, U, eps, order, 1.0)
        ),
        "the Frobenius norm adds up all directions: the strongest one decides, so take the spectral norm": (
            partial(_from_strengths, norm="fro")
        ),
        "the weakest direction: the strongest one decides": partial(_from_strengths, norm=-2, heads=min),
        "the weakest head: the strongest one decides": partial(_from_strengths, heads=min),
        "the mean over the heads: the strongest one decides": partial(_from_strengths, heads=np.mean),
        "the sum over the heads: the strongest one decides": partial(_from_strengths, heads=sum),
        "d stands where p belongs in s": partial(_from_strengths, axis=1),
        "this is the strength of whole tokens: the series is in the Wₖ, what the heads see of them": (
            lambda z, U, *rest: _from_strengths(z, U, *rest, heads=lambda _: _whole_strength(z, U, rest[0]))
        ),
    }
    edges = [
        (tokens(1, 5, seed=7), subspaces(1, 5, 2, seed=8), 0.4, 0, 0.2),
        (1e-3 * tokens(9, 6, seed=9), subspaces(4, 6, 1, seed=10), 0.7, 6, 0.5),
        (
            tokens(7, 4, seed=11),
            torch.stack([basis * scale for scale, basis in enumerate(random(3, 4, 2, seed=12))]),
            1,
            1,
            0.1,
        ),
    ]
    rules = [
        also("order 0, one token, lines and a head that sees nothing are allowed", *edges, oracle=_bisected),
        no_search(STRETCHES[0]),
    ]
    grade(function, STRETCHES, _bisected, "bisection on the measured error", mistakes, rules=rules)


def _series_error(factor: float, z: Tensor, U: Tensor, eps: float, order: int) -> float:
    """The largest relative error of a direction, without eigenvalues of W: ‖(Σ(I − B)ʲ) B − I‖."""
    worst = 0.0
    for basis in U.numpy():
        w = factor * z.numpy() @ basis
        B = np.eye(w.shape[1]) + w.shape[1] / (len(w) * eps**2) * w.T @ w
        series = sum(np.linalg.matrix_power(np.eye(len(B)) - B, j) for j in range(order + 1))
        worst = max(worst, np.linalg.norm(series @ B - np.eye(len(B)), 2))
    return worst


def _bisected(z: Tensor, U: Tensor, eps: float, order: int, tolerance: float) -> float:
    low, high = 1e-6, 1e6
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _series_error(middle, z, U, eps, order) < tolerance else (low, middle)
    return low


def _from_strengths(
    z: Tensor,
    U: Tensor,
    eps: float,
    order: int,
    tolerance: float,
    norm: int | str = 2,
    heads: Callable = max,
    root: float = 0.5,
    more: int = 1,
    axis: int = 2,
    square: int = 2,
) -> float:
    s = U.shape[axis] / (len(z) * eps**2)
    strength = heads([s * np.linalg.norm(z.numpy() @ basis, norm) ** square for basis in U.numpy()])
    return (tolerance ** (1 / (order + more)) / strength) ** root


def _absolute(z: Tensor, U: Tensor, eps: float, order: int, tolerance: float) -> float:
    """Where the error, not divided by 1/(1 + x), is the tolerance."""
    low, high = 0.0, 1e6
    for _ in range(100):
        x = (low + high) / 2
        low, high = (x, high) if x ** (order + 1) / (1 + x) < tolerance else (low, x)
    return low**0.5 * _from_strengths(z, U, eps, order, 1.0)


def _whole_strength(z: Tensor, U: Tensor, eps: float) -> float:
    return U.shape[2] / (len(z) * eps**2) * np.linalg.norm(z.numpy(), 2) ** 2


def _gradient(z: Tensor, U: Tensor, eps: float = 0.5) -> Tensor:
    """∇R^c by automatic differentiation, through log-determinants of n×n matrices."""
    s, moved = U.shape[2] / (len(z) * eps**2), z.clone().requires_grad_()
    eye = torch.eye(len(z), dtype=z.dtype, device=z.device)
    rate = sum(torch.linalg.slogdet(eye + s * moved @ basis @ basis.T @ moved.T)[1] for basis in U) / 2
    return torch.autograd.grad(rate, moved)[0]


def _gram(z: Tensor, U: Tensor) -> Tensor:
    return sum(z @ basis @ basis.T @ z.T @ z @ basis @ basis.T for basis in U)


def _softmax(z: Tensor, U: Tensor) -> Tensor:
    return _mssa(z, U)


def _mssa(z: Tensor, U: Tensor, over: str = "keys", width: str = "p", whole: bool = False) -> Tensor:
    """One query and one head after the other, with plain sums of exponentials."""
    out = np.zeros(z.shape)
    d, p = U.shape[1:]
    divisor = {"p": p**0.5, "d": d**0.5, "no root": p, "none": 1}[width]
    for basis in U.numpy():
        w = z.numpy() @ basis
        score = w @ w.T / divisor
        weight = _weights(score, over)
        for i in range(len(w)):
            for j in range(len(w)):
                out[i] += weight[i, j] * (z[j].numpy() if whole else basis @ w[j])
    return torch.from_numpy(out)


def _weights(score: np.ndarray, over: str) -> np.ndarray:
    """Softmax of (queries, keys) over one of the two; a line of −∞ gives zeros."""
    axis = {"keys": 1, "queries": 0}[over]
    largest = score.max(axis, keepdims=True)
    exponential = np.exp(score - np.where(np.isfinite(largest), largest, 0))
    return exponential / np.maximum(exponential.sum(axis, keepdims=True), 1e-300)


def _layer(
    z: Tensor,
    projection: Tensor,
    output: Tensor,
    bias: Tensor,
    n_heads: int,
    mask: str = "future",
    over: str = "keys",
    width: str = "p",
    split: str = "k p",
    join: str = "k p",
) -> Tensor:
    """The layer, one text, head and token after the other."""
    b, n, d = z.shape
    p = d // n_heads
    heads = {"k p": lambda k: range(k * p, (k + 1) * p), "p k": lambda k: range(k, d, n_heads)}
    query, key = np.indices((n, n))
    hidden = {
        "none": key > n,
        "future": key > query,
        "zero": key > query,
        "after": key > query,
        "past": key < query,
        "strict": key >= query,
    }
    out = np.zeros((b, n, d))
    for text in range(b):
        for k in range(n_heads):
            w = z[text].numpy() @ projection.numpy().T
            w = w.reshape(n_heads, n, p)[k] if split == "across" else w[:, list(heads[split](k))]
            score = w @ w.T / {"p": p, "d": d, "none": 1}[width] ** 0.5
            if mask != "after":
                score[hidden[mask]] = 0 if mask == "zero" else -np.inf
            weight = _weights(score, over)
            if mask == "after":
                weight[hidden[mask]] = 0
            attended = np.zeros((n, p))
            for i in range(n):
                for j in range(n):
                    attended[i] += weight[i, j] * w[j]
            if join == "across":
                out[text].reshape(n_heads, n, p)[k] = attended
            else:
                out[text][:, list(heads[join](k))] = attended
    return torch.from_numpy(out @ output.numpy().T) + bias
