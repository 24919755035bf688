"""Checks of the exercises of chapter 1: the coding rate, its slope and its gradient."""

from collections.abc import Callable
from math import log

import numpy as np
import torch
from torch import Tensor

from cratelab.checks.grading import also, grade, predict, random, tokens, unmended
from cratelab.checks.hunting import POSITIVE, hunt, judge
from cratelab.checks.watching import MEASURED, exact, never_calls, no_automatic_differentiation, no_library, no_loop

CASES = [(tokens(30, 6, seed=1), 0.5), (tokens(5, 9, seed=2), 1.7), (tokens(12, 4, seed=3), 0.08)]
REPEATED = torch.cat([tokens(6, 4, seed=10)[[0, 0, 1, 2, 2, 2]], torch.zeros(3, 4, dtype=torch.float64, device="cpu")])
REPEATED[:, 2] = 0  # and a coordinate that no token has
EDGES = [
    (torch.zeros(4, 3, dtype=torch.float64, device="cpu"), 0.5),
    (tokens(1, 5, seed=4), 0.3),
    (random(9, 1, seed=5) @ random(1, 6, seed=6), 0.2),
    (1e-4 * tokens(7, 3, seed=7), 5e-5),
    (tokens(6, 4, seed=8) - 50, 2),
    (tokens(8, 3, seed=9), 200.0),
    (REPEATED, 0.4),
]
EDGE = (
    "tokens may all be zero, or some, lie on a line, or repeat, be one, or tiny; and ε may be tiny, or far too coarse"
)
PAPER = "predict on paper; the check measures"


def change_of_rate(function: Callable[[int], dict[str, float]], reasons: bool = False) -> None:
    """Exercise 1.A: four changes of the rate in nats, predicted, against rates of clouds of rank `r`, ε ≪ σᵢ√(d/n)."""
    mistakes = {
        "finer": {
            "each direction in use pays for the finer precision, and there are r of them": lambda r: log(10),
            "½ log(1 + cσ²) has ε² in c, and the square uses up the ½": lambda r: r / 2 * log(10),
            "the sign is the other way round: finer costs more": lambda r: -r * log(10),
        },
        "rotated": {},
        "padded": {
            "no token has moved, but the error may now spread over 2d directions: d stands in the rate": lambda r: 0,
            "there is a factor ½ before the logarithm": lambda r: r * log(2),
            "the sign is the other way round: with 2d in the place of d, c grows": lambda r: -r / 2 * log(2),
        },
        "diluted": {
            "the rate is per token, and n has doubled while ZZᵀ is the same": lambda r: 0,
            "there is a factor ½ before the logarithm": lambda r: -r * log(2),
            "the sign is the other way round: tokens at the origin are cheap, and the rate is a mean": lambda r: (
                r / 2 * log(2)
            ),
        },
    }
    wrong = dict.fromkeys(mistakes)
    for r in (1, 3, 6):
        n, d, eps = 40, 12, 1e-4
        z = random(n, r, seed=r) @ torch.linalg.qr(random(d, r, seed=r + 10)).Q.T
        turn = torch.linalg.qr(random(d, d, seed=r + 20)).Q
        after = {
            "finer": _rate(z, eps / 10),
            "rotated": _rate(z @ turn, eps),
            "padded": _rate(torch.cat([z, torch.zeros_like(z)], dim=1), eps),
            "diluted": _rate(torch.cat([z, torch.zeros_like(z)], dim=0), eps),
        }
        answer = predict(function, r, keys=after, numbers=True)
        for key, rate in after.items():
            measured = rate - _rate(z, eps)
            if not abs(answer[key] - measured) <= 1e-4:  # NaN is not right
                named = (text for text, wrong in mistakes[key].items() if abs(answer[key] - wrong(r)) < 1e-6)
                reason = next(named, "compare ½ log(1 + cσ²) before and after, one singular value at a time")
                said = f", rank {r}: you say {answer[key]:z.3f} nats, measured: {measured:z.3f}; {reason}"
                wrong[key] = wrong[key] or said
    judge(function, wrong, reasons)
    no_library((3,), why=PAPER)(function)
    never_calls((3,), MEASURED, PAPER)(function)
    print(
        f"{function.__name__}: right. The changes measured on clouds of rank 1, 3 and 6, ε ≪ σᵢ√(d/n), "
        "are what you predict, to 1e-4."
    )


BUGS = {
    "the mean of the tokens is subtracted": {"centre": True},
    "n and d are the wrong way round": {"swap": True},
    "there is ε where ε² is meant": {"power": 1},
}


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 1.B: (z, eps) that expose the bugs of a coding rate."""
    hunt(inputs, _rate, BUGS, {"z": "n d", "eps": POSITIVE}, tell=tell)


def mended_rate(function: Callable[[Tensor, float], Tensor], inputs: Callable[[], list[tuple]]) -> None:
    """Exercise 1.B: the coding rate of (n, d) tokens, against singular values, after the hunt."""
    exposing(inputs, tell=False)
    mistakes = unmended(_rate, BUGS)
    mistakes["the factor ½ is lost"] = lambda z, eps: 2 * _rate(z, eps)
    mistakes["this is what all n tokens cost together: the rate is per token"] = lambda z, eps: len(z) * _rate(z, eps)
    many = (
        "the determinant is larger than any number a computer has: only its logarithm is needed",
        (random(60, 50, seed=11), 1e-3),
    )
    rules = [no_library(CASES[0]), also(EDGE, *EDGES, oracle=_rate), also(*many, oracle=_rate)]
    grade(function, CASES, _rate, "a sum over singular values", mistakes, rules=rules)


def seen_dimensions(function: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 1.C: −dR/d log ε of (n, d) tokens, against the slope between two precisions."""

    def slope(z: Tensor, eps: float) -> float:
        step = 1e-4
        return -(_rate(z, eps * np.exp(step)) - _rate(z, eps * np.exp(-step))) / (2 * step)

    def shares(z: Tensor, eps: float) -> np.ndarray:
        cs2 = _scaled_values(z, eps)
        return cs2 / (1 + cs2)

    def seen(z: Tensor, eps: float) -> float:
        return float(shares(z, eps).sum())

    mistakes = {
        "half of what is right: ε² = exp(2 log ε), so its derivative brings a 2 that uses up the ½": lambda z, eps: (
            shares(z, eps).sum() / 2
        ),
        "twice what is right: the ½ of R is lost": lambda z, eps: 2 * shares(z, eps).sum(),
        "the sign: R falls as ε grows, and minus its slope is asked for": lambda z, eps: -shares(z, eps).sum(),
        "this is dR/dε: by the logarithm of ε there is one more factor ε": lambda z, eps: shares(z, eps).sum() / eps,
        "this is the trace without the inverse: the derivative of log det B is tr(B⁻¹ dB)": lambda z, eps: (
            _scaled_values(z, eps).sum()
        ),
        "this is tr(B⁻¹), the directions that are not seen": lambda z, eps: z.shape[1] - shares(z, eps).sum(),
        "this is the rank, which counts a direction however small it is": lambda z, eps: np.linalg.matrix_rank(z),
    }
    rules = [no_automatic_differentiation(CASES[0]), exact(seen, *CASES), also(EDGE, *EDGES, oracle=seen)]
    grade(function, CASES, slope, "the slope of R between two precisions", mistakes, rtol=1e-6, rules=rules)


def weighted_matrix(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 1.D, first step: B of tokens with any weights, (d, d), against a sum over tokens."""

    def summed(z: Tensor, w: Tensor, eps: float, share: float | None = None, rooted: bool = False) -> np.ndarray:
        total = np.eye(z.shape[1])
        for weight, row in zip(w.tolist(), z.numpy(), strict=True):
            weight = weight**2 if rooted else share or weight
            total += z.shape[1] / eps**2 * weight * np.outer(row, row)
        return total

    weights = [random(len(z), seed=len(z)).exp() for z, _ in CASES]
    cases = [(z, w / w.sum(), eps) for (z, eps), w in zip(CASES, weights, strict=True)]
    mistakes = {
        "I is missing": lambda z, w, eps: summed(z, w, eps) - np.eye(z.shape[1]),
        "the weights have no effect: this is B for equal ones": lambda z, w, eps: summed(z, w, eps, share=1 / len(z)),
        "each token weighs 1": lambda z, w, eps: summed(z, w, eps, share=1),
        "the weights are squared: √wᵢ goes to each of the two factors": lambda z, w, eps: summed(
            z, w, eps, rooted=True
        ),
        "divided by n: the weights sum to 1, and the 1/n is in them": lambda z, w, eps: summed(
            z, w, eps * len(z) ** 0.5
        ),
        "there is ε where ε² is meant": lambda z, w, eps: summed(z, w, eps**0.5),
        "n stands where d belongs": lambda z, w, eps: summed(z, w, eps * (z.shape[1] / len(z)) ** 0.5),
    }
    one, none = (
        torch.ones(1, dtype=torch.float64, device="cpu"),
        torch.tensor([0.0, 1, 0], dtype=torch.float64, device="cpu"),
    )
    edges = [(tokens(1, 3, seed=12), one, 0.5), (tokens(3, 4, seed=13), none, 0.7), (REPEATED, one.expand(9) / 9, 0.3)]
    small = torch.cat([1 - 8 * one / 1e4, one.expand(8) / 1e4])
    edges.append((tokens(9, 3, seed=14), small, 0.01))
    rules = [also("a token may be one, zero, or weigh nothing or little", *edges, oracle=summed)]
    grade(function, cases, summed, "a sum over tokens", mistakes, rules=rules)


def worth(function: Callable[[Tensor, float], Tensor]) -> None:
    """Exercise 1.D: dR/dwᵢ of weighted tokens at equal weights, (n,), against automatic differentiation."""

    def autograd(z: Tensor, eps: float) -> Tensor:
        n, d = z.shape
        w = torch.full((n,), 1 / n, dtype=z.dtype, device=z.device, requires_grad=True)
        rows = z * w.sqrt()[:, None]
        rate = torch.linalg.slogdet(torch.eye(n, dtype=z.dtype, device=z.device) + d / eps**2 * rows @ rows.T)[1] / 2
        return torch.autograd.grad(rate, w)[0]

    def quadratic(z: Tensor, eps: float, power: int) -> Tensor:
        """d/ε² zᵢᵀ B^power zᵢ, by eigenvectors."""
        n, d = z.shape
        values, vectors = np.linalg.eigh(np.eye(d) + d / (n * eps**2) * z.T.numpy() @ z.numpy())
        return torch.from_numpy(((z.numpy() @ vectors) ** 2 * values**power).sum(1)) * d / eps**2

    mistakes = {
        "twice what is right: the ½ of R is lost": lambda z, eps: quadratic(z, eps, -1),
        "B is not inverted: the derivative of log det B is tr(B⁻¹ dB)": lambda z, eps: quadratic(z, eps, 1) / 2,
        "there is no B⁻¹: this is only the squared length of each token": lambda z, eps: quadratic(z, eps, 0) / 2,
        "this is divided by n: the derivative is by wᵢ, and dB/dwᵢ has no 1/n": lambda z, eps: (
            quadratic(z, eps, -1) / (2 * len(z))
        ),
        "each token weighs 1 in your B: at equal weights it is 1/n, since they sum to 1": lambda z, eps: (
            quadratic(z, eps / len(z) ** 0.5, -1) / (2 * len(z))
        ),
        "the factor d/ε² is lost: dB/dwᵢ = d/ε² zᵢzᵢᵀ": lambda z, eps: quadratic(z, eps, -1) / 2 * eps**2 / z.shape[1],
    }
    rules = [
        no_automatic_differentiation(CASES[0]),
        also(EDGE, *EDGES, oracle=autograd),
        no_loop((tokens(10, 4, seed=9), 0.5), (tokens(20, 4, seed=9), 0.5), "tokens"),
        exact(autograd, *CASES),
    ]
    grade(function, CASES, autograd, "automatic differentiation", mistakes, rules=rules)


def _scaled_values(z: Tensor, eps: float, centre: bool = False, swap: bool = False, power: int = 2) -> np.ndarray:
    """d/(nε²) σ² for each singular value; with the mistakes of Exercise 1.B where asked."""
    n, d = z.shape
    array = z.numpy() - z.numpy().mean(0) if centre else z.numpy()
    return (n / d if swap else d / n) / eps**power * np.linalg.svd(array, compute_uv=False) ** 2


def _rate(z: Tensor, eps: float, **mistakes: object) -> float:
    return float(np.log1p(_scaled_values(z, eps, **mistakes)).sum() / 2)
