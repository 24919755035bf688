"""Checks of the exercises of chapter 4: thresholds, ISTA and its layer."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cratelab.checks.grading import CheckFailed, also, grade, predict, random, unmended
from cratelab.checks.hunting import COUNT, NOT_NEGATIVE, POSITIVE, hunt, judge
from cratelab.checks.watching import HONOUR, differentiable, exact, no_library, no_loop, no_search, watch

SQUARE = [
    (random(6, 5, seed=1), random(5, 5, seed=2), 0.1, 0.3, 3),
    (random(4, 7, seed=3), random(7, 7, seed=4) / 2, 0.4, 0.2, 2),
    (2 * random(9, 3, seed=5), random(3, 3, seed=6), 0.15, 0.5, 4),
]
OVERCOMPLETE = [
    (random(6, 5, seed=1), random(5, 12, seed=2), 0.1, 0.3),
    (random(4, 7, seed=3), random(7, 9, seed=4) / 2, 0.3, 0.2),
    (2 * random(9, 3, seed=5), random(3, 8, seed=6), 0.2, 0.5),
]
ENTRIES = [
    (3 * random(200, seed=1), 0.5, 0.7, 1.2),
    (2 * random(10, 20, seed=2), 1.1, 0.2, 0.6),
    (4 * random(150, seed=3), 0.2, 2.5, 0.9),
]


def change_of_firing(function: Callable[[], dict[str, str]], reasons: bool = False) -> None:
    """Exercise 4.A: "more", "fewer" or "same" for six changes, against neurons counted before and after."""
    draws = [(random(300, 32, seed=2 * i), random(32, 128, seed=2 * i + 1) / 4) for i in range(10)]
    once, twice = (1, 1, 0.1, 0.1, 1), (1, 1, 0.1, 0.1, 2)  # factors of tokens and atoms, η, λ and steps
    changed = {
        "longer_step": (
            once,
            (1, 1, 0.2, 0.1, 1),
            "η stands in front of Dᵀz and of λ: S(ηDᵀz) at ηλ is η times S at λ",
        ),
        "longer_tokens": (once, (2, 1, 0.1, 0.1, 1), "the price stays, and more correlations exceed it"),
        "dearer": (once, (1, 1, 0.1, 0.2, 1), "fewer correlations exceed a higher price"),
        "both": (once, (2, 1, 0.1, 0.2, 1), "what counts is the price relative to the tokens"),
        "second_step": (
            once,
            twice,
            "inhibition has two signs: atoms with negative overlaps push others up, and two small steps switch on more "
            "than they switch off",
        ),
        "disguised": (twice, (1, 2, 0.025, 0.2, 2), "eq. 4.10 with c = 2: all codes are halved, none is set to 0"),
    }
    answer = predict(function, keys=changed, words=("more", "fewer", "same"))
    wrong = dict.fromkeys(changed)
    for key, (before, after, reason) in changed.items():
        firing = [
            [
                int((_projected(a * z, b * D, *rest) > 1e-12).sum()) / (len(z) * D.shape[1])
                for a, b, *rest in (before, after)
            ]
            for z, D in draws
        ]
        signs = {"same" if first == then else "more" if then > first else "fewer" for first, then in firing}
        if signs != {answer[key]}:
            mean, least, most = (f([then - first for first, then in firing]) for f in (np.mean, min, max))
            wrong[key] = (
                f": you say {answer[key]!r}, counted in each of {len(draws)} draws: {' and '.join(sorted(signs))} "
                f"({mean:+.1%} of the neurons, {least:+.1%} to {most:+.1%}); {reason}"
            )
    judge(function, wrong, reasons, {key: reason for key, (*_, reason) in changed.items()})
    no_library((), why="predict on paper; the check counts")(function)
    print(f"{function.__name__}: right, all {len(changed)}, as counted in each of {len(draws)} draws.")


BUGS = {
    "D and Dᵀ are exchanged": {"exchanged": True},
    "the threshold is λ instead of ηλ": {"threshold": "λ"},
    "the code is not clamped at zero": {"shrink": "both"},
}


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 4.B: (z, D, step_size, lam, n_steps) that expose the bugs of an ISTA for square dictionaries."""
    needs = {"z": "n d", "D": "d d", "step_size": POSITIVE, "lam": NOT_NEGATIVE, "n_steps": COUNT}
    hunt(inputs, _ista, BUGS, needs, tell=tell)


def mended_ista(
    function: Callable[[Tensor, Tensor, float, float, int], Tensor], inputs: Callable[[], list[tuple]]
) -> None:
    """Exercise 4.B, after the hunt: codes (n, d) in a (d, d) dictionary, against projected gradient descent."""
    exposing(inputs, tell=False)
    mistakes = unmended(_ista, BUGS)
    mistakes |= {
        "it starts from the tokens: here a code starts from zero": partial(_ista, start="tokens"),
        "what exceeds the threshold is kept whole: it should be reduced by the threshold": partial(
            _ista, shrink="hard"
        ),
        "there is no threshold, only a ReLU: a price must be paid": partial(_ista, threshold="0"),
        "only the last step has a threshold: each step has one": partial(_ista, threshold="last"),
    }
    steps = [(*SQUARE[0][:4], 1), (*SQUARE[1][:4], 30)]
    edges = [
        (torch.zeros(3, 4, dtype=torch.float64, device="cpu"), random(4, 4, seed=7), 0.2, 0.1, 3),
        (random(1, 5, seed=8), random(5, 5, seed=9), 0.1, 0, 3),
        (1e-3 * random(4, 3, seed=10), random(3, 3, seed=11), 0.2, 1e-4, 2),
    ]
    rules = [
        no_library(SQUARE[0]),
        also("it is to take as many steps as it is asked for", *steps, oracle=_projected),
        also("tokens may be zero, one, or tiny, and λ may be 0", *edges, oracle=_projected),
    ]
    grade(function, SQUARE, _projected, "projected gradient descent on the lasso", mistakes, rules=rules)


def best_entry(function: Callable[[Tensor, float, float, float], Tensor]) -> None:
    """Exercise 4.C: the cheapest a in [0, cap] for each x, against a search that evaluates the cost alone."""

    def searched(x: Tensor, theta: float, mu: float, cap: float) -> Tensor:
        low, high = torch.zeros_like(x), torch.full_like(x, cap)
        for _ in range(80):  # the cost is convex: of two inner points, the dearer one bounds the minimum
            left, right = low + (high - low) / 3, high - (high - low) / 3
            left_cost, right_cost = ((a - x) ** 2 / 2 + theta * a + mu * a**2 / 2 for a in (left, right))
            low, high = torch.where(left_cost > right_cost, left, low), torch.where(left_cost > right_cost, high, right)
        return torch.where(low > 0, (low + high) / 2, 0)  # a bound that never moved is the minimum

    def by_cases(x: Tensor, theta: float, mu: float, cap: float) -> Tensor:
        inside = torch.where(x < theta + (1 + mu) * cap, (x - theta) / (1 + mu), cap)
        return torch.where(x > theta, inside, 0)

    mistakes = {
        "the threshold comes after the division: set the slope to zero and solve for a": lambda x, theta, mu, cap: (
            np.clip(x / (1 + mu) - theta, 0, cap)
        ),
        "not clamped at zero: a < 0 is not allowed": lambda x, theta, mu, cap: np.minimum((x - theta) / (1 + mu), cap),
        "two-sided: a < 0 is not allowed": lambda x, theta, mu, cap: np.clip(
            np.sign(x) * np.maximum(abs(x) - theta, 0) / (1 + mu), -cap, cap
        ),
        "two-sided, and capped above only: a < 0 is not allowed": lambda x, theta, mu, cap: np.minimum(
            np.sign(x) * np.maximum(abs(x) - theta, 0) / (1 + mu), cap
        ),
        "the cap is missing: a neuron fires at most at cap": lambda x, theta, mu, cap: np.maximum(
            (x - theta) / (1 + mu), 0
        ),
        "x is capped: it is a that has a largest value": lambda x, theta, mu, cap: (
            np.maximum(np.minimum(x, cap) - theta, 0) / (1 + mu)
        ),
        "capped before the division: it is the result that has a largest value": lambda x, theta, mu, cap: (
            np.clip(x - theta, 0, cap) / (1 + mu)
        ),
        "the squared price has no effect: it divides": lambda x, theta, mu, cap: np.clip(x - theta, 0, cap),
        "the squared price shifts, as a price a unit does: its slope at a is μa, so it divides": (
            lambda x, theta, mu, cap: np.clip(x - theta - mu, 0, cap)
        ),
        "twice the squared price: ½μa² has the slope μa": lambda x, theta, mu, cap: np.clip(
            (x - theta) / (1 + 2 * mu), 0, cap
        ),
        "multiplied by 1 + μ: solve (1 + μ)a = x − θ": lambda x, theta, mu, cap: np.clip(
            (x - theta) * (1 + mu), 0, cap
        ),
        "the price θ a unit has no effect: it shifts": lambda x, theta, mu, cap: np.clip(x / (1 + mu), 0, cap),
        "a hard threshold: what exceeds θ is still reduced by θ": lambda x, theta, mu, cap: np.clip(
            np.where(x > theta, x, 0) / (1 + mu), 0, cap
        ),
        "the sign of θ: a price lowers a": lambda x, theta, mu, cap: np.clip((x + theta) / (1 + mu), 0, cap),
    }
    by_hand = {text: _in_numpy(mistake) for text, mistake in mistakes.items()}
    edges = [
        (torch.tensor(1.7, dtype=torch.float64, device="cpu"), 0.5, 0.3, 2),
        (random(2, 3, 4, seed=4), 0, 0, 0.8),
        (3 * random(40, seed=5), 0, 0.6, 5),
        (3 * random(40, seed=6), 0.4, 0, 5),
        (random(30, seed=7), 0.2, 0.1, 0),
    ]
    rules = [
        also("x may have any shape, and θ, μ and cap may be 0", *edges, oracle=searched, rtol=1e-6, atol=1e-6),
        no_loop((random(20, seed=8), 0.5, 0.7, 1.2), (random(60, seed=8), 0.5, 0.7, 1.2), "entries"),
        no_search(ENTRIES[0], at_most=5),
        exact(by_cases, *ENTRIES, like="a search would be"),
    ]
    by = "a search that evaluates only the cost"
    grade(function, ENTRIES, searched, by, by_hand, rtol=1e-6, atol=1e-6, rules=rules)


def sparse_layer(function: Callable[[Tensor, Tensor, float, float], Tensor]) -> None:
    """Exercise 4.D: (n, d) outputs of two ISTA steps and decoding, then the number of matrix products."""

    def decoded(z: Tensor, D: Tensor, step_size: float, lam: float) -> np.ndarray:
        return _projected(z, D, step_size, lam, 2) @ D.numpy().T

    def variant(z: Tensor, D: Tensor, step_size: float, lam: float, **changes: object) -> np.ndarray:
        return _ista(z, D, step_size, lam, changes.pop("n_steps", 2), **changes) @ D.numpy().T

    def second(keep: float, tokens: float, inhibit: float, price: float) -> Callable:
        """A second step keep·a₁ + η(tokens·Dᵀz − inhibit·DᵀDa₁) − price·ηλ, through the entries of DᵀD."""

        def mistake(z: Tensor, D: Tensor, step_size: float, lam: float) -> np.ndarray:
            first, D = _ista(z, D, step_size, lam, 1), D.numpy()
            push = tokens * np.einsum("nd,dh->nh", z, D) - inhibit * np.einsum("nh,dh,di->ni", first, D, D)
            return np.maximum(keep * first + step_size * push - price * step_size * lam, 0) @ D.T

        return mistake

    mistakes = {
        "the threshold is λ instead of ηλ": partial(variant, threshold="λ"),
        "the code is not clamped at zero": partial(variant, shrink="both"),
        "there is no threshold, only a ReLU": partial(variant, threshold="0"),
        "only the last step has a threshold": partial(variant, threshold="last"),
        "the second step has no threshold: each step has one": second(1, 1, 1, 0),
        "the second step forgets the code of the first: it goes on from A₁": second(0, 1, 1, 1),
        "the second step forgets the tokens: what it sees is z − DA₁": second(1, 0, 1, 1),
        "the second step sees the tokens and not the residual z − DA₁: nothing is explained away": second(1, 1, 0, 1),
        "the sign of DᵀDA₁: what is explained is taken away": second(1, 1, -1, 1),
        "this is one step": partial(variant, n_steps=1),
        "these are three steps": partial(variant, n_steps=3),
        "it starts from Dᵀz: the code starts from zero": partial(variant, start="atoms"),
        "the tokens are added: no residual connection stands around this layer": lambda z, *rest: (
            z.numpy() + decoded(z, *rest)
        ),
        "this is what is left unexplained: the layer returns DA₂": lambda z, *rest: z.numpy() - decoded(z, *rest),
    }
    edges = [
        (torch.zeros(3, 4, dtype=torch.float64, device="cpu"), random(4, 9, seed=9), 0.2, 0.1),
        (random(1, 5, seed=10), random(5, 5, seed=11), 0.1, 0),
        (1e-3 * random(4, 3, seed=12), random(3, 2, seed=13), 0.2, 1e-4),
    ]
    rules = [
        no_library(OVERCOMPLETE[0]),
        also("tokens may be zero, one, or tiny, λ may be 0, and there may be few atoms", *edges, oracle=decoded),
        differentiable(
            decoded, OVERCOMPLETE[0], {0: "z", 1: "D"}, "a layer is trained, so all of it is to be differentiable"
        ),
        _four_products,
    ]
    grade(function, OVERCOMPLETE, decoded, "projected gradient descent, decoded", mistakes, rules=rules)


def _four_products(function: Callable) -> str:
    """The number of products of an (n, ·) by a (d, h) matrix that a layer costs; more than four are refused."""
    n, d, h = 40, 8, 32
    products = watch(function, random(n, d, seed=7), random(d, h, seed=8), 0.05, 0.1).products / (n * d * h)
    if products > 4:
        raise CheckFailed(
            f"{function.__name__} is right, but costs as much as {products:.3g} products of (n, d) and (d, h), and 4 "
            "are enough: from zero the residual is z itself, and D times DᵀDA₁ needs no matrix DᵀD"
        )
    return f"It costs {products:.3g} products." if products > 3.9 else HONOUR


def _in_numpy(mistake: Callable) -> Callable:
    return lambda x, *rest: mistake(x.numpy(), *rest)


def _projected(z: Tensor, D: Tensor, step_size: float, lam: float, n_steps: int) -> np.ndarray:
    """Codes by gradient steps on the lasso, by automatic differentiation, each projected onto a ≥ 0: no threshold."""
    code = z.new_zeros(len(z), D.shape[1])
    for _ in range(n_steps):
        code.requires_grad_()
        objective = ((z.T - D @ code.T) ** 2).sum() / 2 + lam * code.sum()
        code = (code - step_size * torch.autograd.grad(objective, code)[0]).detach().clamp(min=0)
    return code.numpy()


def _ista(
    z: Tensor,
    D: Tensor,
    step_size: float,
    lam: float,
    n_steps: int,
    start: str = "zero",
    threshold: str = "ηλ",
    shrink: str = "relu",
    exchanged: bool = False,
) -> np.ndarray:
    """ISTA, one token after the other, with one thing changed."""
    D, codes = (D.T if exchanged else D).numpy(), []
    for token in z.numpy():
        code = {"zero": np.zeros(D.shape[1]), "tokens": token, "atoms": token @ D}[start]
        for step in range(n_steps):
            x = code + step_size * D.T @ (token - D @ code)
            last = step_size * lam if step == n_steps - 1 else 0.0
            theta = {"ηλ": step_size * lam, "λ": lam, "0": 0.0, "last": last}[threshold]
            code = {
                "relu": np.maximum(x - theta, 0),
                "both": np.sign(x) * np.maximum(abs(x) - theta, 0),
                "hard": np.where(x > theta, x, 0),
            }[shrink]
        codes.append(code)
    return np.array(codes)
