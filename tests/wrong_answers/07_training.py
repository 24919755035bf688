"""Wrong answers to the exercises of chapter 7: what a check says -> a function with that mistake."""

import math

import numpy as np
import torch
from wrong_answers.asked import at_first, hunts, on_request
from wrong_answers.experiments import WRONG_EXPERIMENTS


def rates(steps, warmup, peak, final):
    """The schedule of the chapter, as two lists."""
    T = steps - warmup
    rising = [peak * (t + 1) / warmup for t in range(warmup)]
    falling = [final + (peak - final) / 2 * (1 + math.cos(math.pi * k / T)) for k in range(T)]
    return rising, falling


def total(*recipe):
    return sum(map(sum, rates(*recipe)))


def by_tensor(steps, warmup, peak, final, of=torch):
    T = steps - warmup
    falling = final + (peak - final) / 2 * (1 + of.cos(math.pi * of.arange(T) / T))
    return (peak * (of.arange(warmup) + 1) / warmup).sum() + falling.sum()


def off(change):
    """The right sum, and change(steps, warmup, peak, final)."""
    return lambda *recipe: total(*recipe) + change(*recipe)


def counting(log_q, document, firsts=False):
    first = torch.ones_like(document, dtype=torch.bool)
    first[1:] = document[1:] != document[:-1]
    return ~log_q.isnan() & (firsts | ~first)


def scored(
    floor=lambda p, q, c: -p[c].mean(),
    gap=lambda p, q, c: (p - q)[c].mean(),
    firsts=False,
):
    """Floor and gap, c the tokens that count."""

    def function(log_p, log_q, document):
        chosen = counting(log_q, document, firsts)
        return torch.stack([floor(log_p, log_q, chosen), gap(log_p, log_q, chosen)])

    return function


def by_document(log_p, log_q, document):
    parts = [scored()(log_p[document == j], log_q[document == j], document[document == j]) for j in document.unique()]
    return torch.stack(parts).mean(0)


def by_number(log_p, log_q, document):
    """Takes a token for the first of a document where the number of its document is one higher than the last."""
    first = torch.ones_like(document, dtype=torch.bool)
    first[1:] = document.diff() == 1
    counts = ~first & ~log_q.isnan()
    return torch.stack([-log_p[counts].mean(), (log_p - log_q)[counts].mean()])


def in_a_ring(log_p, log_q, document):
    """Takes the last token for the one before the first."""
    counts = ~log_q.isnan() & (document == document.roll(1))
    return torch.stack([-log_p[counts].mean(), (log_p - log_q)[counts].mean()])


def by_rise(log_p, log_q, document):
    """Thinks that the numbers of documents rise."""
    counts = ~log_q.isnan() & (document.diff(prepend=document[:1] - 1) <= 0)
    return torch.stack([-log_p[counts].mean(), (log_p - log_q)[counts].mean()])


def uncertain(log_p, log_q, document):
    """Takes tokens of which the world is certain for those that nobody had to guess."""
    counts = counting(log_q, document) & (log_p < 0)
    return torch.stack([-log_p[counts].mean(), (log_p - log_q)[counts].mean()])


def adamw(correction=lambda b, t: 1 - b**t, coupled=False, inside=False, by_rate=True, swapped=False, late=False):
    """AdamW with something wrong."""

    def function(w, gradients, rates, betas, decay, eps):
        b1, b2 = betas[::-1] if swapped else betas
        m = v = torch.zeros_like(w)
        for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            g = g + decay * w if coupled else g
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            m_hat, v_hat = m / correction(b1, t), v / correction(b2, t)
            step = m_hat / ((v_hat + eps).sqrt() if inside else v_hat.sqrt() + eps)
            if late:
                w = w - rate * step
            if not coupled:
                w = w - (rate if by_rate else 1) * decay * w
            if not late:
                w = w - rate * step
        return w

    return function


def once(b, t):
    return 1 - b


def count(crate=lambda *_: 0, gpt2=lambda *_: 0, factor=1, text=False):
    """The right counts, and crate or gpt2(d, h, L, v, n, T)."""

    def function(*size):
        d, h, L, v, n, T = size
        right = {
            "CRATE": L * (2 * d * d + 2 * n * d + 2 * T * h * d) + v * d + crate(*size),
            "GPT-2": L * (4 * d * d + 2 * n * d + 2 * h * d) + v * d + gpt2(*size),
        }
        return {key: factor * value * (n if text else 1) for key, value in right.items()}

    return on_request(function)


def exposing():
    w, step, betas = torch.ones(2), torch.tensor([[1.0, -2.0]]), (0.9, 0.95)
    inputs = [(w, step.repeat(3, 1), [0.01] * 3, betas, 0.0, 1e-8), (w, step, [0.01], betas, 0.1, 1e-8)]
    return [*inputs, (w, step, [0.01], betas, 0.0, 0.1)]


def by_torch(w, gradients, rates, betas, decay, eps):
    parameter = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([parameter], betas=betas, weight_decay=decay, eps=eps)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


WRONG = {
    "7.A": {
        "the warm-up's first step has the rate": off(lambda s, w, top, low: -top),
        "the descent's mean is not quite the middle": off(lambda s, w, top, low: -(top - low) / 2),
        "not the area of a triangle": off(lambda s, w, top, low: -top / 2),
        "both sums are taken as areas": lambda s, w, top, low: w * top / 2 + (s - w) * (top + low) / 2,
        "one step too many": off(lambda s, w, top, low: low),
        "the warm-up is missing": lambda *recipe: sum(rates(*recipe)[1]),
        "the descent is missing": lambda *recipe: sum(rates(*recipe)[0]),
        "the warm-up is counted at the full rate": lambda s, w, top, low: w * top + sum(rates(s, w, top, low)[1]),
        "the descent ends at the final rate, not at 0": lambda s, w, top, low: total(s, w, top, 0),
        "the descent has t_end − t_w steps": lambda s, w, top, low: total(s + w, w, top, low),
        "the peak rate times the number of steps": lambda s, w, top, low: s * top,
        "No common mistake": lambda s, w, top, low: s * (top + low) / 2,
        "is right, but loops over steps": total,
        "is right, but makes a list of the rates": by_tensor,
        "makes a list of the rates: a closed form": lambda *recipe: float(by_tensor(*recipe, of=np)),
    },
    "7.B": {
        "differs from a walk .*": lambda p, q, document: scored()(p, q.masked_fill(q == 0, math.nan), document),
        "differs from a walk": lambda p, q, document: scored()(p, q.masked_fill(q < -6, math.nan), document),
        "the first token of each document is counted": scored(firsts=True),
        "the floor is over all tokens, the gap over some": scored(floor=lambda p, q, c: -p.mean()),
        "for which the model was not asked": lambda p, q, document: torch.stack(
            [-p[counting(0 * p, document)].mean(), scored()(p, q, document)[1]]
        ),
        "the first token of each document is in the floor": lambda p, q, document: torch.stack(
            [-p[~q.isnan()].mean(), scored()(p, q, document)[1]]
        ),
        "means over different tokens": scored(lambda p, q, c: -p.mean(), lambda p, q, c: p.mean() - q[c].mean()),
        "documents are averaged first": by_document,
        "the terms are weighted by p": scored(gap=lambda p, q, c: (p.exp() * (p - q))[c].mean()),
        "floor and gap are weighted by p": scored(
            lambda p, q, c: -(p.exp() * p)[c].mean(), lambda p, q, c: (p.exp() * (p - q))[c].mean()
        ),
        "the sign of the gap": scored(gap=lambda p, q, c: (q - p)[c].mean()),
        "the sign of the floor": scored(floor=lambda p, q, c: p[c].mean()),
        "are in the denominator": scored(
            lambda p, q, c: -p[c].sum() / len(p), lambda p, q, c: (p - q)[c].sum() / len(p)
        ),
        "these are bits": lambda *case: scored()(*case) / math.log(2),
        "the second number is the model's loss": scored(gap=lambda p, q, c: -q[c].mean()),
        "it gives .* where .* is right": by_number,
        "No common mistake": by_rise,
        "differs from a walk .* No common mistake": in_a_ring,
        "entry . of 2.* No common mistake": uncertain,
        "returns NaN": lambda p, q, document: torch.stack([-p.mean(), (p - q).mean()]),
    },
    "7.C": {
        "is right, but calls .*: here the steps are yours to write": by_torch,
        "right elsewhere, but .*may be one step or no decay": lambda w, g, r, betas, decay, eps: adamw()(
            w, g, r, betas, decay or 0.01, eps
        ),
        "right elsewhere, but .*β may be 0": lambda w, g, r, betas, *rest: adamw()(
            w, g, r, tuple(beta or 0.9 for beta in betas), *rest
        ),
        "right elsewhere, but .*and weights negative": lambda w, *rest: torch.where(
            w > 0, adamw()(w, *rest), adamw()(w, *rest[:3], 0, rest[4])
        ),
        **hunts(exposing, (torch.ones(2), torch.ones(3, 2), [0.1] * 3, (0.9, 0.95), 0.1, 0.1)),
        ": the averages are divided by 1 − β at every step, which is right for the first alone$": adamw(once),
        ": the decay is still a part of the gradient, and divided by its size$": adamw(coupled=True),
        ": ε stands inside the root$": adamw(inside=True),
        "for the first alone; and the decay is still a part of the gradient, and divided by its size$": adamw(
            once, coupled=True
        ),
        "for the first alone; and the decay .*; and ε stands": adamw(once, coupled=True, inside=True),
        "the averages are not corrected": adamw(lambda b, t: 1),
        "the decay is not multiplied by the rate": adamw(by_rate=False),
        "the decay comes after the step": adamw(late=True),
        "the first step is t = 1": adamw(lambda b, t: 1 - b ** (t + 1)),
        "No common mistake": adamw(swapped=True),
        "No common mistake explains": lambda w, gradients, *rest: torch.where(
            gradients.any(0), adamw()(w, gradients, *rest), w
        ),
    },
    "7.D": {
        "products: 1 of 2 right. Go through your reasons": at_first(count(lambda *size: 1)),
        "CRATE: .* starts from a code of zeros": count(lambda d, h, L, v, n, T: L * h * d),
        "CRATE: .* the sum of atoms DA": count(lambda d, h, L, v, n, T: -L * h * d),
        "CRATE: .* counts the dictionary once": count(lambda d, h, L, v, n, T: -(2 * T - 1) * L * h * d),
        "CRATE: .* each further step has two products": count(lambda d, h, L, v, n, T: -(T - 1) * L * h * d),
        "CRATE: .* query, key and value are one product": count(lambda d, h, L, v, n, T: 2 * L * d * d),
        "CRATE: .* the output matrix of MSSA": count(lambda d, h, L, v, n, T: -L * d * d),
        "CRATE: .* the head is one more": count(lambda d, h, L, v, n, T: -v * d),
        "CRATE: .* the weighted sum of values are missing": count(lambda d, h, L, v, n, T: -2 * L * n * d),
        "CRATE: .* the mask saves nothing": count(lambda d, h, L, v, n, T: -L * n * d),
        "GPT-2: .* to look up an embedding": count(gpt2=lambda d, h, L, v, n, T: v * d),
        "GPT-2: .* query, key and value are three": count(gpt2=lambda d, h, L, v, n, T: -2 * L * d * d),
        "GPT-2: .* an MLP has two": count(gpt2=lambda d, h, L, v, n, T: -L * h * d),
        "counted as two": count(factor=2),
        "for the whole text": count(text=True),
        "go through the layer product by product": count(lambda d, h, L, v, n, T: 7),
        "CRATE: for d=12, h=24, .* go through": count(lambda d, h, L, v, n, T: (4 - 2 * T) * L * h * d),
        "T=1 you say .* go through": count(lambda d, h, L, v, n, T: (T == 1) * h * d),
        "CRATE is None; a whole number": lambda *size: {"CRATE": None, "GPT-2": 1},
        "CRATE is '12'; a whole number": lambda *size: {"CRATE": "12", "GPT-2": 1},
        r"CRATE is .*\.5; a whole number": count(lambda *size: 0.5),
        "CRATE is nan; a whole number": count(lambda *size: math.nan),
    },
    "7.E": WRONG_EXPERIMENTS,
}
