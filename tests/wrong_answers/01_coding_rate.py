"""Wrong answers to the exercises of chapter 1: what a check says -> a function with that mistake."""

from math import log

import torch


def change(**changed):
    """The right predictions but for one."""

    def predict(r):
        right = {"finer": r * log(10), "rotated": 0, "padded": r * log(2) / 2, "diluted": -r * log(2) / 2}
        return right | {key: value(r) for key, value in changed.items()}

    return predict


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


WRONG = {
    "1.A": {
        "finer, rank 3: .* there are r of them": change(finer=lambda r: log(10)),
        "the square uses up the ½": change(finer=lambda r: r * log(10) / 2),
        "finer costs more": change(finer=lambda r: -r * log(10)),
        "rotated, rank 1: .* compare ½ log": change(rotated=lambda r: r * 0.1),
        "the error may now spread over 2d directions": change(padded=lambda r: 0),
        "padded, rank 1: .* a factor ½ before": change(padded=lambda r: r * log(2)),
        "n has doubled while ZZᵀ is the same": change(diluted=lambda r: 0),
        "diluted, rank 1: .* a factor ½ before": change(diluted=lambda r: -r * log(2)),
        "tokens at the origin are cheap": change(diluted=lambda r: r * log(2) / 2),
        "with the keys finer, rotated, padded, diluted": lambda r: {"finer": r * log(10)},
    },
    "1.B": {
        "the mean of the tokens is still subtracted: try tokens far from the origin$": rate(right, centre=True),
        ": n and d are still the wrong way round: try listing every token twice$": rate(lambda n, d, e: n / (d * e**2)),
        ": there is still ε where ε² is meant: try centimetres .*metres$": rate(lambda n, d, e: d / (n * e)),
        "twice; and there is still ε where ε² is meant": rate(lambda n, d, e: n / (d * e)),
        "subtracted: .*; and n and d .*; and there is still ε": rate(lambda n, d, e: n / (d * e), centre=True),
        "the factor ½ is lost": rate(right, half=1),
        "what all n tokens cost together": lambda z, eps: len(z) * rate(right)(z, eps),
        "No common mistake explains it": rate(lambda n, d, e: 1 / (n * e**2)),
    },
    "1.C": {
        "half of what is right": lambda z, eps: seen(z, eps) / 2,
        "twice what is right": lambda z, eps: 2 * seen(z, eps),
        "the sign": lambda z, eps: -seen(z, eps),
        "this is dR/dε": lambda z, eps: seen(z, eps) / eps,
        "the trace without the inverse": lambda z, eps: torch.trace(matrices(z, eps)[0]),
        "the directions that are not seen": lambda z, eps: torch.trace(torch.linalg.inv(matrices(z, eps)[1])),
        "this is the rank": lambda z, eps: torch.linalg.matrix_rank(z),
        "No common mistake": lambda z, eps: torch.logdet(matrices(z, eps)[1]),
    },
    "1.D": {
        "the ½ of R is lost": lambda z, eps: z.shape[1] / eps**2 * leverage(z, eps),
        "B is not inverted": lambda z, eps: (
            z.shape[1] / eps**2 / 2 * torch.einsum("ni,ij,nj->n", z, matrices(z, eps)[1], z)
        ),
        "only the squared length": lambda z, eps: z.shape[1] / eps**2 / 2 * z.square().sum(1),
        "this is divided by n": lambda z, eps: z.shape[1] / eps**2 / 2 * leverage(z, eps) / len(z),
        "the factor d/ε² is lost": lambda z, eps: leverage(z, eps) / 2,
        "each token weighs 1 in your B": lambda z, eps: z.shape[1] / eps**2 / 2 * leverage(z, eps / len(z) ** 0.5),
        r"returns the shape \(\)": lambda z, eps: z.shape[1] / eps**2 / 2 * leverage(z, eps).sum(),
    },
}
