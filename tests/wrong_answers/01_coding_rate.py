"""Wrong answers to the exercises of chapter 1: what a check says -> a function with that mistake."""

from math import log

import torch
from wrong_answers.asked import at_first, hunts, in_place_of, on_request

import cratelab as cl


def change(**changed):
    """The right predictions but for one."""

    def predict(r):
        right = {"finer": r * log(10), "rotated": 0, "padded": r * log(2) / 2, "diluted": -r * log(2) / 2}
        return right | {key: value(r) for key, value in changed.items()}

    return on_request(predict)


def rate(scale, centre=False, half=0.5):
    """½ logdet(I + scale(n, d, eps) zᵀz)."""

    def function(z, eps):
        n, d = z.shape
        z = z - z.mean(0) if centre else z
        return half * torch.logdet(torch.eye(d) + scale(n, d, eps) * z.T @ z)

    return function


def right(n, d, eps):
    return d / (n * eps**2)


def matrices(z, eps):
    """(cZᵀZ, I + cZᵀZ)."""
    n, d = z.shape
    gram = d / (n * eps**2) * z.T @ z
    return gram, torch.eye(d) + gram


def seen(z, eps):
    gram, B = matrices(z, eps)
    return torch.trace(torch.linalg.inv(B) @ gram)


def leverage(z, eps):
    return torch.einsum("ni,ij,nj->n", z, torch.linalg.inv(matrices(z, eps)[1]), z)


def measured(z_of, eps=1e-4):
    """Four changes of a rate that `rate_of` computes, in the place of predictions."""

    def function(r):
        z = torch.zeros(40, 12)
        z[:r, :r] = 10 * torch.eye(r)
        before = z_of(z, eps)
        changed = {"finer": z_of(z, eps / 10), "rotated": before, "padded": z_of(torch.cat([z, 0 * z], 1), eps)}
        changed["diluted"] = z_of(torch.cat([z, 0 * z]), eps)
        return {key: value - before for key, value in changed.items()}

    return function


def without_tiny(z, eps):
    """The rate of the singular values that somebody thought were not noise."""
    values = torch.linalg.svdvals(z)
    n, d = z.shape
    return torch.log1p(d / (n * eps**2) * values[values > 1e-2] ** 2).sum() / 2


def slope(z, eps, step=1e-5):
    """A quotient of differences, by log ε."""
    rates = [rate(right)(z, eps * (1 + sign * step)) for sign in (1, -1)]
    return (rates[1] - rates[0]) / (2 * step)


def slope_by_autograd(z, eps):
    at = torch.tensor(eps, dtype=torch.float64).log().requires_grad_()
    return -torch.autograd.grad(rate(right)(z, at.exp()), at)[0]


def worth_by(gradient):
    def function(z, eps):
        n, d = z.shape
        return gradient(lambda w: torch.logdet(torch.eye(d) + d / eps**2 * (z.T * w) @ z) / 2, torch.full((n,), 1 / n))

    return function


def backwards(objective, w):
    w.requires_grad_()
    objective(w).backward()
    return w.grad


def by_differences(objective, w, step=1e-6):
    return torch.stack([(objective(w + x) - objective(w - x)) / (2 * step) for x in step * torch.eye(len(w))])


def token_by_token(z, eps):
    inverse = torch.linalg.inv(matrices(z, eps)[1])
    return torch.stack([z.shape[1] / eps**2 / 2 * (row @ inverse @ row) for row in z])


def exposing():
    square = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(1, 2)
    return [(square + 1, 1.0), (torch.cat([square, square]), 1.0), (square, 0.5)]


def weighted(scale=lambda n, d, eps: d / eps**2, weigh=lambda w: w, eye=1):
    def function(z, w, eps):
        return eye * torch.eye(z.shape[1]) + scale(*z.shape, eps) * (z.T * weigh(w)) @ z

    return function


WRONG_MATRICES = {
    "weighted_matrix: I is missing": weighted(eye=0),
    "the weights have no effect": weighted(weigh=lambda w: torch.full_like(w, 1 / len(w))),
    "each token weighs 1$": weighted(weigh=torch.ones_like),
    "the weights are squared": weighted(weigh=torch.square),
    "divided by n: the weights sum to 1": weighted(scale=lambda n, d, eps: d / (n * eps**2)),
    "weighted_matrix: there is ε where ε² is meant": weighted(scale=lambda n, d, eps: d / eps),
    "n stands where d belongs": weighted(scale=lambda n, d, eps: n / eps**2),
}
WRONG = {
    "1.A": {
        "calls .*linalg_cholesky|calls cholesky: predict on paper": lambda r: (
            change()(r) | {"rotated": float(torch.linalg.cholesky(torch.eye(r)).diagonal().log().sum())}
        ),
        "change_of_rate: 2 of 4 right. Go through": at_first(change(finer=lambda r: 1.0, padded=lambda r: 0)),
        "finer, rank 3: .* there are r of them": change(finer=lambda r: log(10)),
        "the square uses up the ½": change(finer=lambda r: r * log(10) / 2),
        "finer costs more": change(finer=lambda r: -r * log(10)),
        "rotated, rank 1: .* compare ½ log": change(rotated=lambda r: r * 0.1),
        "the error may now spread over 2d directions": change(padded=lambda r: 0),
        "padded, rank 1: .* a factor ½ before": change(padded=lambda r: r * log(2)),
        "n has doubled while ZZᵀ is the same": change(diluted=lambda r: 0),
        "diluted, rank 1: .* a factor ½ before": change(diluted=lambda r: -r * log(2)),
        "tokens at the origin are cheap": change(diluted=lambda r: r * log(2) / 2),
        "with the keys finer, rotated, padded, diluted; rotated is missing": lambda r: {"finer": r * log(10)},
        "with the keys .*; it returns None: does it end in `return`": lambda r: None,
        "finer: a number is needed; got None": change(finer=lambda r: None),
        "padded: a number is needed; got a str, '0.35'": change(padded=lambda r: "0.35"),
        "rotated: a number is needed; got a list": change(rotated=lambda r: [0.0]),
        "you say nan nats": change(diluted=lambda r: float("nan")),
        "calls cratelab's coding_rate: predict on paper": measured(cl.coding_rate),
        "calls logdet: predict on paper": measured(lambda z, eps: rate(right)(z, eps)),
    },
    "1.B": {
        "right elsewhere, but .*or some, .*or repeat": lambda z, eps: rate(right)(z.unique(dim=0), eps),
        "right elsewhere, but .*may all be zero, or some": lambda z, eps: rate(right)(
            z[z.any(1)] if z.any() else z, eps
        ),
        "right elsewhere, but .*lie on a line, or repeat": lambda z, eps: rate(right)(
            z[:, z.any(0)] if z.any() else z, eps
        ),
        "but: the determinant is larger than any number": lambda z, eps: (
            rate(right)(z, eps) + 0 * matrices(z, eps)[1].det().clamp(min=1)
        ),
        **hunts(exposing, (torch.arange(20.0).reshape(5, 4).sin(), 0.5)),
        "the mean of the tokens is subtracted$": rate(right, centre=True),
        ": n and d are the wrong way round$": rate(lambda n, d, e: n / (d * e**2)),
        ": there is ε where ε² is meant$": rate(lambda n, d, e: d / (n * e)),
        "round; and there is ε where ε² is meant": rate(lambda n, d, e: n / (d * e)),
        "subtracted; and n and d .*; and there is ε": rate(lambda n, d, e: n / (d * e), centre=True),
        "the factor ½ is lost": rate(right, half=1),
        "is right, but calls cratelab's coding_rate": lambda z, eps: cl.coding_rate(z, eps),
        "right elsewhere, but .* tokens may .*, be one, or tiny": without_tiny,
        "changes its arguments in place": lambda z, eps: rate(right)(z.div_(eps), 1.0),
        "what all n tokens cost together": lambda z, eps: len(z) * rate(right)(z, eps),
        "No common mistake explains it": rate(lambda n, d, e: 1 / (n * e**2)),
    },
    "1.C": {
        "right elsewhere, but .*or repeat": lambda z, eps: seen(z.unique(dim=0), eps),
        "half of what is right": lambda z, eps: seen(z, eps) / 2,
        "twice what is right": lambda z, eps: 2 * seen(z, eps),
        "the sign": lambda z, eps: -seen(z, eps),
        "this is dR/dε": lambda z, eps: seen(z, eps) / eps,
        "the trace without the inverse": lambda z, eps: torch.trace(matrices(z, eps)[0]),
        "is right, but uses automatic differentiation": slope_by_autograd,
        "only, as a quotient of differences would be": slope,
        "right elsewhere, but .* gives .* where .* is right: tokens may": lambda z, eps: seen(z, max(eps, 1e-2)),
        "right elsewhere, but .* far too coarse": lambda z, eps: seen(z, eps) * (seen(z, eps) > 1e-3),
        "the directions that are not seen": lambda z, eps: torch.trace(torch.linalg.inv(matrices(z, eps)[1])),
        "this is the rank": lambda z, eps: torch.linalg.matrix_rank(z),
        "No common mistake": lambda z, eps: torch.logdet(matrices(z, eps)[1]),
    },
    "1.D": {
        "right elsewhere, but .*or weigh nothing or little": in_place_of(
            "weighted_matrix",
            lambda z, w, eps: torch.eye(z.shape[1]) + z.shape[1] / eps**2 * (z.T * w.clamp(min=1e-3)) @ z,
        ),
        **{message: in_place_of("weighted_matrix", answer) for message, answer in WRONG_MATRICES.items()},
        "the ½ of R is lost": lambda z, eps: z.shape[1] / eps**2 * leverage(z, eps),
        "B is not inverted": lambda z, eps: (
            z.shape[1] / eps**2 / 2 * torch.einsum("ni,ij,nj->n", z, matrices(z, eps)[1], z)
        ),
        "only the squared length": lambda z, eps: z.shape[1] / eps**2 / 2 * z.square().sum(1),
        "this is divided by n": lambda z, eps: z.shape[1] / eps**2 / 2 * leverage(z, eps) / len(z),
        "the factor d/ε² is lost": lambda z, eps: leverage(z, eps) / 2,
        "uses automatic differentiation: derive": worth_by(backwards),
        "is right, but uses automatic differentiation": worth_by(lambda objective, w: torch.func.grad(objective)(w)),
        "loops over tokens: .* a line runs [0-9]+ times instead of": token_by_token,
        "right elsewhere, but .* gives .* where .* is right: tokens may": worth_by(by_differences),
        "each token weighs 1 in your B": lambda z, eps: z.shape[1] / eps**2 / 2 * leverage(z, eps / len(z) ** 0.5),
        r"returns the shape \(\)": lambda z, eps: z.shape[1] / eps**2 / 2 * leverage(z, eps).sum(),
    },
}
