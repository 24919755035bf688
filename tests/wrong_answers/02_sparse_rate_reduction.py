"""Wrong answers to the exercises of chapter 2: what a check says -> a function with that mistake."""

import torch
from einops import einsum
from wrong_answers.asked import at_first, hunts, in_place_of, on_request
from wrong_answers.experiments import WRONG_EXPERIMENTS

import cratelab as cl


def say(**changed):
    """The right predictions but for one."""
    right = {"longer": "same", "blended": "same", "uncorrelated": "up", "split": "up", "twice": "down", "dropped": "up"}
    return on_request(lambda: right | changed)


def rates(z, U, scale):
    """½ logdet(I + scale WᵀW) of each subspace."""
    w = einsum(z, U, "n d, k d p -> k n p")
    return torch.logdet(torch.eye(U.shape[2]) + scale * w.mT @ w) / 2


def by_p(z, U, eps):
    return U.shape[2] / (len(z) * eps**2)


def by_d(z, U, eps):
    return z.shape[1] / (len(z) * eps**2)


def joined(z, U, scale):
    w = einsum(z, U, "n d, k d p -> n k p").flatten(1)
    return torch.logdet(torch.eye(w.shape[1]) + scale * w.T @ w) / 2


def inverse(z, scale):
    return torch.linalg.inv(torch.eye(z.shape[1]) + scale * z.T @ z)


def labelled(weight, inner, whole=1.0, sign=-1.0, factor=1.0):
    """weight(n_j, n) · (rows)(I + d/(inner(n_j, n)ε²) …)⁻¹ for each group, under the gradient of all tokens."""

    def function(z, group, eps):
        n, d = z.shape
        c = d / eps**2
        out = whole * c / n * z @ inverse(z, c / n)
        for j in group.unique():
            rows = z[group == j]
            m = len(rows)
            out[group == j] += sign * weight(m, n) * c * rows @ inverse(rows, c / inner(m, n))
        return factor * out

    return function


def lifted(shrink, scale=by_p, factor=1.0):
    """factor · s Σ_k (W_k shrunk) U_kᵀ."""

    def function(z, U, eps):
        s, out = scale(z, U, eps), torch.zeros_like(z)
        for basis in U:
            w = z @ basis
            out += s * shrink(w, s) @ basis.T
        return factor * out

    return function


def solved(w, s):
    return w @ inverse(w, s)


def without_gaps(labels):
    """The gradient, going through `labels(group)` for the labels."""

    def function(z, group, eps):
        out = cl.coding_rate_gradient(z, eps)
        for j in labels(group):
            part = group == j
            if part.any():
                out[part] -= part.sum() / len(z) * cl.coding_rate_gradient(z[part], eps)
        return out

    return function


def empty_too(z, group, eps):
    out = cl.coding_rate_gradient(z, eps)
    for j in range(int(group.max()) + 1):
        out[group == j] -= (group == j).sum() / len(z) * cl.coding_rate_gradient(z[group == j], eps)
    return out


def labels_by_autograd(z, group, eps):
    z = z.requires_grad_() if z.is_leaf else z
    rate = cl.coding_rate(z, eps)
    for j in group.unique():
        rate = rate - (group == j).sum() / len(z) * cl.coding_rate(z[group == j], eps)
    return torch.autograd.grad(rate, z)[0]


def at_once(inverse):
    """The gradient of R^c for all subspaces at once, by an inverse of an (n, n) or (d, d) matrix."""

    def function(z, U, eps):
        s, w = by_p(z, U, eps), z @ U
        if inverse == "n":
            shrunk = torch.linalg.inv(torch.eye(len(z)) + s * w @ w.mT) @ w
        elif inverse == "d":
            shrunk = z @ torch.linalg.inv(torch.eye(z.shape[1]) + s * U @ w.mT @ z) @ U
        return s * einsum(shrunk, U, "k n p, k d p -> n d")

    return function


def token_sums(z, U, eps):
    """p × p matrices to solve with, but the moments summed over pairs of tokens that meet."""
    s, w = by_p(z, U, eps), z @ U
    moments = w.mT @ (torch.eye(len(z)) @ w)
    return s * (w @ torch.linalg.inv(torch.eye(U.shape[2]) + s * moments) @ U.mT).sum(0)


def subspaces_by_autograd(z, U, eps):
    z = z.clone().requires_grad_()
    rates(z, U, by_p(z, U, eps)).sum().backward()
    return z.grad


def looked_up():
    U = torch.linalg.qr(torch.randn(8, 8)).Q.unflatten(1, (2, 4)).transpose(0, 1)
    cl.rate_reduction(torch.randn(20, 8), U, 1e-2)
    return say()()


def exposing():
    z, U = torch.randn(9, 4), torch.eye(4)[None]
    return [(z, U[:, :, :2], 0.5), (z, torch.cat([U, U]), 0.5)]


WRONG = {
    "2.A": {
        "calls .*cholesky.*: predict on paper": lambda: (
            say()() | {"longer": "same" if torch.linalg.cholesky(torch.eye(2)).any() else "up"}
        ),
        "change_of_reduction: 4 of 6 right. Go through": at_first(say(longer="up", twice="same")),
        "longer: .* grow by log 3 a direction": say(longer="up"),
        "blended: .* rates see only ZZᵀ": say(blended="down"),
        r"uncorrelated: .* \(Fischer\)": say(uncorrelated="same"),
        "split: .* the ceiling .* grows with K": say(split="same"),
        "twice: .* so R\\^c doubles": say(twice="same"),
        "dropped: .* no objective for subspaces": say(dropped="down"),
        'should return "up", "down" or "same" .*; dropped is a str': say(dropped="sideways"),
        'should return "up", "down" or "same" .*; twice is a list': say(twice=["down"]),
        'should return "up", "down" or "same" .*; it returns a set': lambda: {"up"},
        "is right, but calls cratelab's .*: predict on paper": looked_up,
    },
    "2.B": {
        "right elsewhere, but .*tokens may be zero, tiny, equal": lambda z, U, eps: rates(
            z.unique(dim=0), U, U.shape[2] / (len(z.unique(dim=0)) * eps**2)
        ).sum(),
        "right elsewhere, but .*subspaces lines or equal": lambda z, U, eps: rates(
            z, U.unique(dim=0), U.shape[2] / (len(z) * eps**2)
        ).sum(),
        **hunts(exposing, (torch.randn(5, 4), torch.eye(4)[[0, 0]][:, :, None], 0.5)),
        "the columns of each basis in U are to be orthonormal": in_place_of(
            "exposing", lambda: [(torch.ones(3, 2), 2 * torch.eye(2)[None], 1.0)]
        ),
        ": d stands where p belongs": lambda z, U, eps: rates(z, U, by_d(z, U, eps)).sum(),
        ": the mean over the subspaces: R\\^c is their sum": lambda z, U, eps: rates(z, U, by_p(z, U, eps)).mean(),
        "their sum; and d stands where p": lambda z, U, eps: rates(z, U, by_d(z, U, eps)).mean(),
        ": d/K stands where p belongs": lambda z, U, eps: rates(z, U, by_d(z, U, eps) / len(U)).sum(),
        "one book for all coordinates together: take": lambda z, U, eps: joined(z, U, by_p(z, U, eps)),
        "one book for all coordinates together, and d": lambda z, U, eps: joined(z, U, by_d(z, U, eps)),
        "is right, but calls cratelab's subspace_rate": lambda z, U, eps: cl.subspace_rate(z, U, eps),
        "right elsewhere, but .* ε tiny or far too coarse": lambda z, U, eps: rates(
            z, U, U.shape[2] / (len(z) * max(eps, 1e-3) ** 2)
        ).sum(),
        "the factor ½ is lost": lambda z, U, eps: 2 * rates(z, U, by_p(z, U, eps)).sum(),
        r"returns the shape \(4,\)": lambda z, U, eps: rates(z, U, by_p(z, U, eps)),
    },
    "2.C": {
        "right elsewhere, but .*: labels may have gaps or be": lambda z, group, eps: without_gaps(torch.unique)(
            z, group.abs(), eps
        ),
        "the weights n_j/n of the groups are missing": labelled(lambda m, n: 1 / m, lambda m, n: m),
        "inside the inverse of a part stands n_j": labelled(lambda m, n: 1 / n, lambda m, n: n),
        "the parts are added": labelled(lambda m, n: 1 / n, lambda m, n: m, sign=1.0),
        "the parts are missing": labelled(lambda m, n: 0, lambda m, n: m),
        "∇R of all tokens is missing": labelled(lambda m, n: 1 / n, lambda m, n: m, whole=0.0),
        "the sign: this is the way down": labelled(lambda m, n: 1 / n, lambda m, n: m, factor=-1.0),
        "right elsewhere, but .*: labels may have gaps": without_gaps(lambda group: range(len(group.unique()))),
        "right elsewhere, but .* be negative": without_gaps(lambda group: range(int(group.max()) + 1)),
        "right elsewhere, but .* gives .*: labels may have gaps or be negative": lambda z, group, eps: without_gaps(
            torch.unique
        )(z, group.clamp(min=0), eps),
        "raises ValueError .*Other cases are right, but: labels may have gaps": empty_too,
        "right elsewhere, but .*a group may have one token": lambda z, group, eps: without_gaps(
            lambda group: [j for j in group.unique() if (group == j).sum() > 1]
        )(z, group, eps),
        "is right, but uses automatic differentiation": lambda z, *rest: labels_by_autograd(z.clone(), *rest),
        "twice what is right": labelled(lambda m, n: 1 / n, lambda m, n: m, factor=2.0),
    },
    "2.D": {
        "right elsewhere, but .*subspaces lines or equal": lambda z, U, eps: lifted(solved)(z, U.unique(dim=0), eps),
        "is right, but calls cratelab's subspace_rate_gradient": lambda z, U, eps: cl.subspace_rate_gradient(z, U, eps),
        "loops over subspaces": lifted(solved),
        "solves with a 40×40 matrix": at_once("n"),
        "solves with a 9×9 matrix": at_once("d"),
        "twice as many tokens (cost|need)": token_sums,
        "is right, but uses automatic differentiation": subspaces_by_autograd,
        "twice what is right": lifted(solved, factor=2),
        "half of what is right": lifted(solved, factor=0.5),
        "d stands where p belongs": lifted(solved, scale=by_d),
        "the mean over the subspaces": lambda z, U, eps: lifted(solved)(z, U, eps) / len(U),
        "in front is lost": lifted(lambda w, s: solved(w, s) / s),
        "the matrix is not inverted": lifted(lambda w, s: w + s * w @ w.T @ w),
        "there is no inverse": lifted(lambda w, s: w),
        "chapter 3's approximation": lifted(lambda w, s: w - s * w @ w.T @ w),
        "the sign": lifted(solved, factor=-1),
        r"returns the shape \(4, 20, 2\)": lambda z, U, eps: einsum(z, U, "n d, k d p -> k n p"),
    },
    "2.E": WRONG_EXPERIMENTS,
}
