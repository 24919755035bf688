"""Wrong answers to the exercises of chapter 3: what a check says -> a function with that mistake."""

import math

import numpy as np
import torch
from einops import einsum, rearrange
from wrong_answers.asked import at_first, hunts, on_request

import cratelab as cl


def say(**changed):
    """The right exponents but for one."""
    right = {"exact_small": 1, "exact_large": -1, "gram": 3}
    right |= {"softmax_small": 1, "softmax_centred": 3, "softmax_large": 1}
    return on_request(lambda: right | changed)


def attend(axis=-1, width=2, whole=False, scale=None, over_heads=torch.sum):
    """MSSA with a softmax over `axis`, scores divided by the root of the length of axis `width` of U."""

    def function(z, U):
        w = einsum(z, U, "n d, k d p -> k n p")
        weights = (w @ w.mT * (scale or U.shape[width] ** -0.5)).softmax(axis)
        heads = weights @ z if whole else weights @ w @ U.mT
        return over_heads(heads, 0)

    return function


def stepped(change=lambda z, w, U, s, kappa: s * w, factor=lambda kappa: kappa, width=2, start=1):
    """start·Z less factor(κ) times the tokens that `change` makes in each subspace, lifted."""

    def function(z, U, step_size, eps):
        s = U.shape[width] / (len(z) * eps**2)
        w = einsum(z, U, "n d, k d p -> k n p")
        return start * z - factor(step_size) * einsum(change(z, w, U, s, step_size), U, "k n p, k d p -> n d")

    return function


def first_order(z, w, U, s, kappa):
    return s * w - s**2 * w @ (w.mT @ w)


def exact(z, w, U, s, kappa):
    return s * w @ torch.linalg.inv(torch.eye(w.shape[2]) + s * w.mT @ w)


def fills_space(z, U, step_size, eps):
    s = U.shape[2] / (len(z) * eps**2)
    w = einsum(z, U, "n d, k d p -> k n p")
    return (1 - step_size * s) * z + step_size * s**2 * einsum(w @ w.mT @ w, U, "k n p, k d p -> n d")


def quadratic_cost(z, U, step_size, eps):
    s = U.shape[2] / (len(z) * eps**2)
    w = einsum(z, U, "n d, k d p -> k n p")
    return z - step_size * einsum(s * w - s**2 * (w @ w.mT) @ w, U, "k n p, k d p -> n d")


def hide(scores):
    """Scores with −∞ where the key comes after the query."""
    return scores.masked_fill(later(scores), -math.inf)


def later(scores, diagonal=1):
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal)


def strict(scores):
    weights = scores.masked_fill(later(scores, 0), -math.inf).softmax(-1)
    return weights.nan_to_num(0)


def layer(weigh=lambda scores: hide(scores).softmax(-1), split="(k p)", join="(k p)", scale=lambda d, p: p**-0.5):
    """The layer with another way from scores to weights, or another order of heads."""

    def function(z, projection, output, bias, n_heads):
        w = rearrange(z @ projection.T, f"b n {split} -> b k n p", k=n_heads)
        attended = weigh(w @ w.mT * scale(z.shape[-1], w.shape[-1])) @ w
        return rearrange(attended, f"b k n p -> b n {join}") @ output.T + bias

    return function


def plain_torch(swap_in=True, swap_out=True):
    """The layer with reshapes in the place of einops, with or without swapping the axes of tokens and heads."""

    def function(z, projection, output, bias, n_heads):
        b, n, d = z.shape
        w = z @ projection.T
        w = w.view(b, n, n_heads, -1).transpose(1, 2) if swap_in else w.view(b, n_heads, n, -1)
        attended = hide(w @ w.mT / w.shape[-1] ** 0.5).softmax(-1) @ w
        attended = attended.transpose(1, 2) if swap_out else attended
        return attended.reshape(b, n, d) @ output.T + bias

    return function


def stretch(norm=2, over_heads=torch.max, root=0.5, power=lambda m: 1 / (m + 1), width=2, square=2):
    def function(z, U, eps, order, tolerance):
        w = einsum(z, U, "n d, k d p -> k n p")
        strengths = U.shape[width] / (len(z) * eps**2) * torch.linalg.matrix_norm(w, norm) ** square
        return (tolerance ** power(order) / over_heads(strengths)) ** root

    return function


def absolute_error(z, U, eps, order, tolerance):
    """The largest c with (c²x)^(m+1)/(1 + c²x) below the tolerance, as a root of a polynomial in c²x."""
    radius = stretch(power=lambda m: 0)(z, U, eps, order, tolerance)
    roots = np.roots([1] + [0] * (order - 1) + [-tolerance, -tolerance])
    return radius * float(roots.real[abs(roots.imag) < 1e-9].max()) ** 0.5


def whole_tokens(z, U, eps, order, tolerance):
    s = U.shape[2] / (len(z) * eps**2)
    return (tolerance ** (1 / (order + 1)) / s) ** 0.5 / torch.linalg.matrix_norm(z, 2)


def measured():
    cl.mssa(torch.randn(4, 3), torch.linalg.qr(torch.randn(1, 3, 3)).Q)
    return say()()


def in_heads(z, U, step_size, eps, attended):
    s, w = U.shape[2] / (len(z) * eps**2), z @ U
    return z - step_size * (s * (w - s * attended(w)) @ U.mT).sum(0)


def row_by_row(z, U, step_size, eps):
    """No n×n matrix is ever held, and each token is still compared with each."""
    return in_heads(z, U, step_size, eps, lambda w: torch.stack([torch.stack([(x @ v) @ x for v in x]) for x in w]))


def in_numpy(z, U, step_size, eps):
    return in_heads(
        z, U, step_size, eps, lambda w: torch.from_numpy((w.numpy() @ w.numpy().transpose(0, 2, 1)) @ w.numpy())
    )


def by_einsum(z, U, step_size, eps):
    return in_heads(
        z,
        U,
        step_size,
        eps,
        lambda w: torch.einsum("knm,kmq->knq", (w[:, :, None] * w[:, None]).sum(-1), w),
    )


def by_loops(over):
    """The layer, with a loop over one axis in the place of its name."""

    def function(z, projection, output, bias, n_heads):
        if over == "texts":
            return torch.cat([layer()(text[None], projection, output, bias, n_heads) for text in z])
        w = rearrange(z @ projection.T, "b n (k p) -> b k n p", k=n_heads)
        if over == "heads":
            heads = []
            for k in range(n_heads):
                x = w[:, k]
                heads.append(hide(x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x)
            attended = torch.stack(heads, 1)
        else:
            rows = []
            for i in range(z.shape[1]):
                scores = w[:, :, : i + 1] @ w[:, :, i, :, None] / w.shape[-1] ** 0.5
                rows.append((scores.softmax(-2) * w[:, :, : i + 1]).sum(-2))
            attended = torch.stack(rows, 2)
        return rearrange(attended, "b k n p -> b n (k p)") @ output.T + bias

    return function


def fused(z, projection, output, bias, n_heads):
    w = rearrange(z @ projection.T, "b n (k p) -> b k n p", k=n_heads)
    attended = torch.nn.functional.scaled_dot_product_attention(w, w, w, is_causal=True)
    return rearrange(attended, "b k n p -> b n (k p)") @ output.T + bias


def by_library(z, projection, output, bias, n_heads):
    module = cl.Mssa(z.shape[-1], n_heads).double()
    with torch.no_grad():
        module.projection.weight.copy_(projection)
        module.output.weight.copy_(output)
        module.output.bias.copy_(bias)
        return module(z)


def searched(z, U, eps, order, tolerance):
    strongest = float(stretch(power=lambda m: 0)(z, U, eps, order, tolerance)) ** -2
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if (middle**2 * strongest) ** (order + 1) < tolerance:
            low = middle
        else:
            high = middle
    return low


def exposing():
    corners, plane = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), torch.eye(3)[None, :, :2]
    flat = torch.cat([corners, torch.zeros(4, 1)], 1)
    return [(torch.randn(4, 2), torch.eye(2)[None]), (flat, plane), (torch.ones(1, 3), plane)]


def softmax(exponents):
    """MSSA with weights by a softmax of one's own."""

    def function(z, U):
        w = einsum(z, U, "n d, k d p -> k n p")
        e = exponents(w @ w.mT / U.shape[2] ** 0.5).exp()
        return einsum(e / e.sum(-1, keepdim=True) @ w, U, "k n p, k d p -> n d")

    return function


def masked_by(finite):
    """The layer with a number added to the scores of the future."""

    def function(z, projection, output, bias, n_heads):
        w = rearrange(z @ projection.T, "b n (k p) -> b k n p", k=n_heads)
        scores = w @ w.mT / w.shape[-1] ** 0.5
        weights = (scores + torch.full(scores.shape[-2:], finite).triu(1)).softmax(-1)
        return rearrange(weights @ w, "b k n p -> b n (k p)") @ output.T + bias

    return function


WRONG = {
    "3.A": {
        "exponents: 4 of 6 right. Go through": at_first(say(gram=2, softmax_centred=1)),
        "exact_small: .* near zero the inverse is I": say(exact_small=3),
        "exact_large: .* the inverse wins": say(exact_large=1),
        "gram: .* three factors": say(gram=2),
        "softmax_small: .* the mean token": say(softmax_small=3),
        "softmax_centred: .* two factors": say(softmax_centred=1),
        "softmax_large: .* takes all the weight": say(softmax_large=0),
        "gram: a number is needed; got None": say(gram=None),
        "gram: a number is needed; got a str, '3'": say(gram="3"),
        "gram: you say nan, measured: 3.00": say(gram=math.nan),
        "softmax_large: you say inf": say(softmax_large=math.inf),
        "a dict with the keys .*; exact_small is missing": lambda: {"exact": 1, "gram": 3, "softmax": 1},
        "a dict with the keys .*; it returns a list": lambda: [1, -1, 3, 1, 3, 1],
        "is right, but calls cratelab's mssa: predict": measured,
    },
    "3.B": {
        "mended_mssa (is right elsewhere, but|returns numbers that are not finite)": softmax(lambda s: s),
        "not finite": softmax(lambda s: s - s.max()),
        "right elsewhere, but .*subspaces lines, or equal": lambda z, U: attend()(z, U.unique(dim=0)),
        **hunts(exposing, (torch.arange(15.0).reshape(5, 3).sin(), torch.eye(3)[None, :, :2])),
        r"mended_mssa: softmax over queries instead of keys: what sums to 1 for each query\?$": attend(axis=-2),
        r"mended_mssa: the scale is 1/√d instead of 1/√p$": attend(width=1),
        "mended_mssa: the values are whole tokens: [^;]*$": attend(whole=True),
        "softmax over queries .*; and the scale is 1/√d [^;]*$": attend(axis=-2, width=1),
        "softmax over queries .*; and the values are whole": attend(axis=-2, whole=True),
        "mended_mssa: the scale is 1/√d .*; and the values are whole": attend(width=1, whole=True),
        "softmax over queries .*; and the scale .*; and the values": attend(axis=-2, width=1, whole=True),
        "there is no 1/√p before the softmax": attend(scale=1.0),
        "the scale is 1/p: the root is missing": lambda z, U: attend(scale=1 / U.shape[2])(z, U),
        "is right, but calls cratelab's mssa": lambda z, U: cl.mssa(z, U),
        "right elsewhere, but .*: tokens may be zero, one, equal, or very long": lambda z, U: attend()(
            z.clamp(-9, 9), U
        ),
        "the mean over the heads": attend(over_heads=torch.mean),
        r"returns the shape \(3, 7, 2\)": lambda z, U: z @ U,
    },
    "3.C": {
        "the sign of the second term": stepped(lambda z, w, U, s, kappa: s * w + s**2 * w @ w.mT @ w),
        "one s is missing": stepped(lambda z, w, U, s, kappa: s * w - s * w @ w.mT @ w),
        "Z stands where ΣUₖUₖᵀZ belongs": fills_space,
        "the attended part is missing": stepped(),
        "the shrinking part is missing": stepped(lambda z, w, U, s, kappa: -(s**2) * w @ w.mT @ w),
        "d stands where p belongs": stepped(first_order, width=1),
        "this is the gradient": stepped(first_order, factor=lambda kappa: -1, start=0),
        "the step size κ is missing": stepped(first_order, factor=lambda kappa: 1),
        "κ is missing from the attended part": stepped(lambda z, w, U, s, kappa: s * w - s**2 / kappa * w @ w.mT @ w),
        "this step goes up": stepped(first_order, factor=lambda kappa: -kappa),
        "this is the exact step": stepped(exact),
        "the attended part has a factor 2": stepped(lambda z, w, U, s, kappa: s * w - 2 * s**2 * w @ w.mT @ w),
        "is right, but calls cratelab's neumann_gradient": lambda z, U, step_size, eps: (
            z - step_size * cl.neumann_gradient(z, U, eps, order=1)
        ),
        "twice as many tokens (cost|need|run) .*: it compares tokens with tokens": row_by_row,
        "twice as many tokens need .* the memory: it compares": in_numpy,
        "twice as many tokens (cost|need) [34]": by_einsum,
        "twice as many tokens cost .* it compares tokens with tokens": quadratic_cost,
    },
    "3.D": {
        "right elsewhere, but .*or very long ones": masked_by(-100.0),
        "right elsewhere, but .*a text may have one token, or very long": masked_by(-1e4),
        "the mask leaks the future: token i": layer(lambda scores: scores.softmax(-1)),
        "the mask is the wrong way round": layer(
            lambda scores: scores.masked_fill(later(scores).mT, -math.inf).softmax(-1)
        ),
        "the mask leaks the future: a score of 0": layer(
            lambda scores: scores.masked_fill(later(scores), 0).softmax(-1)
        ),
        "the mask hides a token from itself": layer(strict),
        "numbers that are not finite": layer(
            lambda scores: scores.masked_fill(later(scores, 0), -math.inf).softmax(-1)
        ),
        "masked after the softmax": layer(lambda scores: scores.softmax(-1).tril()),
        "softmax over queries instead of keys": layer(lambda scores: hide(scores).softmax(-2)),
        "the scale is 1/√d": layer(scale=lambda d, p: d**-0.5),
        "there is no 1/√p": layer(scale=lambda d, p: 1),
        r"interleaved, \(p k\) for \(k p\)": layer(split="(p k)", join="(p k)"),
        "interleaved on the way in": layer(split="(p k)"),
        "interleaved on the way out": layer(join="(p k)"),
        "the heads are cut across tokens, in and out": plain_torch(swap_in=False, swap_out=False),
        r"the heads are cut across tokens: reshape to \(b, n, k, p\)": plain_torch(swap_in=False),
        "the heads are joined across tokens": plain_torch(swap_out=False),
        "the projection is transposed": lambda z, projection, *rest: layer()(z, projection.T, *rest),
        "the output matrix is transposed": lambda z, projection, output, *rest: layer()(z, projection, output.T, *rest),
        "both matrices are transposed": lambda z, projection, output, *rest: layer()(z, projection.T, output.T, *rest),
        "loops over texts": by_loops("texts"),
        "loops over heads": by_loops("heads"),
        "loops over tokens": by_loops("tokens"),
        "calls scaled_dot_product_attention: write the softmax": fused,
        "is right, but calls cratelab's": by_library,
        "right elsewhere, but .*a text may have one token": lambda z, *rest: (
            layer()(z, *rest) if z.shape[1] > 1 else 0 * z
        ),
        "the bias is missing": lambda z, projection, output, bias, k: layer()(z, projection, output, 0, k),
        "the Uₖ lift the heads": lambda z, projection, output, bias, k: layer()(z, projection, projection.T, bias, k),
        "the tokens are added": lambda z, *rest: z + layer()(z, *rest),
    },
    "3.E": {
        "the error is absolute": absolute_error,
        "the norm is not squared: the": stretch(square=1),
        "the norm is not squared, and there is no root": stretch(square=1, root=1),
        "the square root is missing": stretch(root=1),
        "the power m \\+ 1, not m": stretch(power=lambda m: 1 / m),
        "where the series begins to diverge": stretch(power=lambda m: 0),
        "the Frobenius norm": stretch(norm="fro"),
        "the weakest direction": stretch(norm=-2, over_heads=torch.min),
        "searches: a line runs 201 times": searched,
        "right elsewhere, but .*order 0": lambda z, U, eps, order, tolerance: stretch()(
            z, U, eps, order or 1, tolerance
        ),
        "returns numbers that are not finite": lambda *case: math.nan,
        "returns a str; a number was expected|returns a str, 'c'": lambda *case: "c",
        "the weakest head": stretch(over_heads=torch.min),
        "the mean over the heads": stretch(over_heads=torch.mean),
        "the sum over the heads": stretch(over_heads=torch.sum),
        "d stands where p belongs": stretch(width=1),
        "this is the strength of whole tokens": whole_tokens,
    },
}
