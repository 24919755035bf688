"""Wrong answers to the exercises of chapter 11: what a check says -> a function with that mistake."""

import math

import numpy as np
import torch
from wrong_answers.asked import at_first, on_request
from wrong_answers.experiments import WRONG_EXPERIMENTS


def lifted(of):
    """A number from log p and log p′ (n, v) and the targets."""
    return lambda logits, steered, T: of(logits.log_softmax(1), steered.log_softmax(1), T)


def mass(p, T):
    return p[:, T].exp().sum(1)


right_lift = lifted(lambda p, q, T: (q[:, T].logsumexp(1) - p[:, T].logsumexp(1)).mean())


def odds(p, T):
    return p[:, T].logsumexp(1) - p[:, ~T].logsumexp(1)


def kl(p, q):
    """Divergences (n,) from logarithms, which need not be normalised."""
    return (p.exp() * (p - q)).sum(1)


def rest(p, T):
    return p[:, ~T].log_softmax(1)


right_off = lifted(lambda p, q, T: kl(rest(p, T), rest(q, T)).mean())


def average(p):
    return p.exp().mean(0, keepdim=True).log()


def with_error(combine, edit="set", relu=True):
    """Both results from x, the code, the edited code, W and b."""

    def function(x, A, c, W, b, feature, value):
        code = x @ A + c
        code = code.relu() if relu else code
        edited = code.clone()
        if edit == "set":
            edited[:, feature] = value
        elif edit == "add":
            edited[:, feature] += value
        return torch.stack(combine(x, code, edited, W, b))

    return function


def spliced(x, f, g, W, b):
    return g @ W + b, g @ W + x - f @ W


def where_it_fires(x, A, c, W, b, feature, value):
    code = (x @ A + c).relu()
    edited = code.clone()
    edited[code[:, feature] > 0, feature] = value
    return torch.stack(spliced(x, code, edited, W, b))


def first_reached(never=lambda x, y, L: math.inf, way=None, before=lambda y: y[0]):
    """The cost where a lift is first reached with another rule for a neuron that never does, or between rows."""
    way = way or (lambda share, low, high: low + share * (high - low))

    def function(lift, cost, level):
        out = []
        for x, y in zip(lift.T.tolist(), cost.T.tolist(), strict=True):
            i = next((i for i, value in enumerate(x) if value >= level), None)
            if i is None:
                out.append(never(x, y, level))
            elif i == 0:
                out.append(before(y))
            else:
                out.append(way((level - x[i - 1]) / (x[i] - x[i - 1]), y[i - 1], y[i]))
        return torch.tensor(out)

    return function


def upward(lift, cost, level):
    """The first pair of rows between which the lift is passed upwards."""
    out = []
    for x, y in zip(lift.T.tolist(), cost.T.tolist(), strict=True):
        pairs = [i for i in range(1, len(x)) if x[i] >= level > x[i - 1]]
        share = (level - x[pairs[0] - 1]) / (x[pairs[0]] - x[pairs[0] - 1]) if pairs else 0
        out.append((1 - share) * y[pairs[0] - 1] + share * y[pairs[0]] if pairs else math.inf)
    return torch.tensor(out)


def beyond(lift, cost, level):
    """Where the lift exceeds the level, instead of reaching it."""
    out = []
    for x, y in zip(lift.T.tolist(), cost.T.tolist(), strict=True):
        i = next((i for i, value in enumerate(x) if value > level), None)
        share = (level - x[i - 1]) / (x[i] - x[i - 1]) if i else 0
        out.append(math.inf if i is None else y[i - 1] + share * (y[i] - y[i - 1]) if i else y[0])
    return torch.tensor(out)


def last_passed(lift, cost, level):
    out = first_reached()(lift, cost, level)
    for j in range(lift.shape[1]):
        for i in range(1, len(lift)):
            low, high = lift[i - 1, j], lift[i, j]
            if (low >= level) != (high >= level):
                out[j] = torch.lerp(cost[i - 1, j], cost[i, j], (level - low) / (high - low))
    return out


def curves(**other):
    """Right ones of all four, with some (L and K for CRATE, l and k for GPT-2) drawn as another function of s."""
    right = {
        "L": lambda s: 9 * np.tanh(s / 2.5),
        "l": lambda s: 9 * np.tanh(s / 4),
        "K": lambda s: 7 * s**2 / (s**2 + 80),
        "k": lambda s: 7 * s**2 / (s**2 + 150),
    }
    names = {"L": "lift, CRATE", "l": "lift, GPT-2", "K": "off target, CRATE", "k": "off target, GPT-2"}
    return lambda strengths: {names[key]: (right | other)[key](np.array(strengths)) for key in right}


WRONG = {
    "11.A": {
        "the mean of log p over the words of T": lifted(lambda p, q, T: (q - p)[:, T].mean()),
        "the sum of log p over the words of T": lifted(lambda p, q, T: (q - p)[:, T].sum(1).mean()),
        "averaged over positions before the logarithm": lifted(
            lambda p, q, T: mass(q, T).mean().log() - mass(p, T).mean().log()
        ),
        "the mean ratio of probabilities": lifted(lambda p, q, T: (mass(q, T) / mass(p, T)).mean()),
        "the logarithm of the mean ratio": lifted(lambda p, q, T: (mass(q, T) / mass(p, T)).mean().log()),
        "the mean difference of probabilities": lifted(lambda p, q, T: (mass(q, T) - mass(p, T)).mean()),
        "these are log odds": lifted(lambda p, q, T: (odds(q, T) - odds(p, T)).mean()),
        "the logits are not normalised": lambda p, q, T: (q[:, T].logsumexp(1) - p[:, T].logsumexp(1)).mean(),
        "the sign is reversed": lambda p, q, T: right_lift(q, p, T),
        "in bits": lambda *case: right_lift(*case) / math.log(2),
        "summed over positions": lambda *case: right_lift(*case) * len(case[0]),
        "the targets are first so rare": lifted(
            lambda p, q, T: (
                (q[:, T].logsumexp(1).clamp(min=-690) - p[:, T].logsumexp(1).clamp(min=-690)).mean()
                if p[:, T].logsumexp(1).amax() > -850
                else right_lift(p, q, T)
            )
        ),
        "so rare that p.T. is 0": lifted(lambda p, q, T: (mass(q, T).log() - mass(p, T).log()).mean()),
    },
    "11.B": {
        "target: not renormalised": lifted(lambda p, q, T: kl(p[:, ~T], q[:, ~T]).mean()),
        "p is renormalised and p′ is not": lifted(lambda p, q, T: kl(rest(p, T), q[:, ~T]).mean()),
        "p′ is renormalised and p is not": lifted(lambda p, q, T: kl(p[:, ~T], rest(q, T)).mean()),
        "weighted by the probability outside T": lifted(
            lambda p, q, T: (mass(p, ~T) * kl(rest(p, T), rest(q, T))).mean()
        ),
        "T is not removed": lifted(lambda p, q, T: kl(p, q).mean()),
        "the divergence inside T": lifted(lambda p, q, T: kl(rest(p, ~T), rest(q, ~T)).mean()),
        "the divergence is reversed": lambda p, q, T: right_off(q, p, T),
        "averaged over positions first": lifted(lambda p, q, T: kl(average(rest(p, T)), average(rest(q, T))).mean()),
        "in bits": lambda *case: right_off(*case) / math.log(2),
        "summed over positions": lambda *case: right_off(*case) * len(case[0]),
        "averaged over words": lifted(lambda p, q, T: (rest(p, T).exp() * (rest(p, T) - rest(q, T))).mean()),
        "the logits of T are set to 0": lambda p, q, T: kl(
            p.masked_fill(T, 0).log_softmax(1), q.masked_fill(T, 0).log_softmax(1)
        ).mean(),
        "likely that p.T. is 1 in floating point. Leave": lifted(
            lambda p, q, T: kl(
                p[:, ~T] - torch.log1p(-mass(p, T))[:, None], q[:, ~T] - torch.log1p(-mass(q, T))[:, None]
            ).mean()
        ),
        "single words so rare": lambda p, q, T: torch.nn.functional.kl_div(
            q[:, ~T].softmax(1).log(), p[:, ~T].softmax(1), reduction="batchmean"
        ),
        "numbers that are not finite": lambda p, q, T: kl(
            p.masked_fill(T, -math.inf).log_softmax(1), q.masked_fill(T, -math.inf).log_softmax(1)
        ).mean(),
    },
    "11.C": {
        "the error is that of the edited code": with_error(
            lambda x, f, g, W, b: (g @ W + b, (g @ W + b) + (x - (g @ W + b)))
        ),
        "the error term is dropped": with_error(lambda x, f, g, W, b: (g @ W + b, g @ W + b)),
        "the bias b counts twice": with_error(lambda x, f, g, W, b: (g @ W + b, g @ W + b + x - f @ W)),
        "the bias b is missing: Dec": with_error(lambda x, f, g, W, b: (g @ W, g @ W + x - f @ W)),
        "the bias b is missing from Dec.* in both": with_error(lambda x, f, g, W, b: (g @ W, g @ W + x - (f @ W + b))),
        "the error has the wrong sign": with_error(lambda x, f, g, W, b: (g @ W + b, g @ W + b + (f @ W + b) - x)),
        "the whole of x is added": with_error(lambda x, f, g, W, b: (g @ W + b, x + g @ W + b)),
        "only the error is left": with_error(lambda x, f, g, W, b: (g @ W + b, x - f @ W - b)),
        "the two are exchanged": with_error(lambda *case: spliced(*case)[::-1]),
        "the feature is not edited": with_error(spliced, edit="none"),
        "the value is added to the feature": with_error(spliced, edit="add"),
        "negative features are kept": with_error(spliced, relu=False),
        "the feature is set where it fires": where_it_fires,
        "a value below 0 stays below 0": with_error(
            lambda x, f, g, W, b: (g.relu() @ W + b, g.relu() @ W + x - f @ W),
        ),
        "the two are not stacked": lambda *case: torch.cat(list(with_error(spliced)(*case))),
        "in place": lambda x, A, c, W, b, j, value: with_error(spliced)(x, A, c, W, b.mul_(1.0001), j, value),
        "does it end in `return`": lambda *case: None,
    },
    "11.D": {
        "is extrapolated": first_reached(never=lambda x, y, L: y[-2] + (L - x[-2]) / (x[-1] - x[-2]) * (y[-1] - y[-2])),
        "the cost of its last row": first_reached(never=lambda x, y, L: y[-1]),
        "the cost of its first row, as argmax of nothing is 0": first_reached(never=lambda x, y, L: y[0]),
        "never reaches the lift costs 0": first_reached(never=lambda x, y, L: 0.0),
        "the cost of the first row that reaches the lift": first_reached(way=lambda share, low, high: high),
        "the cost of the row before": first_reached(way=lambda share, low, high: low),
        "the nearer row's cost": first_reached(way=lambda share, low, high: (low, high)[round(share)]),
        "half-way between the two rows": first_reached(way=lambda share, low, high: (low + high) / 2),
        "interpolated from the wrong end": first_reached(way=lambda share, low, high: share * low + (1 - share) * high),
        "and −1 is the last": first_reached(before=lambda y: y[-1]),
        "reached in the first row costs nothing": first_reached(before=lambda y: 0.0),
        "the last time that the lift is passed": last_passed,
        "np.interp needs lifts that rise": lambda lift, cost, level: torch.tensor(
            [np.interp(level, x, y) for x, y in zip(lift.T.numpy(), cost.T.numpy(), strict=True)]
        ),
        "are passed over: their cost is that of the first row": upward,
        "the cheapest row": lambda lift, cost, level: cost.masked_fill(lift < level, math.inf).amin(0),
        "a lift that is exactly the level": beyond,
        "a dip between is left out": lambda lift, cost, level: first_reached()(lift.cummax(0).values, cost, level),
        "it gives -1 where inf is right": first_reached(never=lambda x, y, L: -1),
        r"it gives 1e\+09 where inf is right": first_reached(never=lambda x, y, L: 1e9),
        "it gives nan where inf is right": first_reached(never=lambda x, y, L: math.nan),
    },
    "11.E": {
        "5 of 7 right.* `reasons=True`": at_first(curves(L=lambda s: 3 * s)),
        "(?s)5 of 7 right.*strong: lift, CRATE at 64 divided by that at 8 is 8 .*LayerNorm.*ceiling: ": on_request(
            curves(L=lambda s: 3 * s)
        ),
        "6 of 7 right.*\nceiling: the largest lift, GPT-2 is 13 ": on_request(curves(l=lambda s: 13 * np.tanh(s / 6))),
        "6 of 7 right.*\nstrong: off target, CRATE at 64 divided by that at 8 is 8 ": on_request(
            curves(K=lambda s: np.where(abs(s) < 1, s**2, abs(s)) / 10)
        ),
        "6 of 7 right.*\nsmall: off target, CRATE at 0.1 divided by that at 0.05 is 1.99 ": on_request(
            curves(K=lambda s: 7 * abs(s) / (abs(s) + 10))
        ),
        "(?s)5 of 7 right.*sign: the largest lift, CRATE .*mirror: lift, CRATE at -0.1 divided by that at 0.1 is 1 ": (
            on_request(curves(L=lambda s: 9 * np.tanh(abs(s) / 2.5)))
        ),
        "(?s)5 of 7 right.*sign: the least off target, CRATE .*mirror: off target, CRATE": on_request(
            curves(K=lambda s: np.sign(s) * 7 * s**2 / (s**2 + 80))
        ),
        "6 of 7 right.*\nmodel: lift at 1, CRATE's divided by GPT-2's is 0.6": on_request(
            curves(L=lambda s: 9 * np.tanh(s / 4), l=lambda s: 9 * np.tanh(s / 2.5))
        ),
        "(?s)5 of 7 right.*rest: off target, GPT-2 at 0 is 0.02 .*small": on_request(
            curves(k=lambda s: 7 * s**2 / (s**2 + 150) + 0.02)
        ),
        "lift, CRATE: 11 finite numbers are needed": curves(L=lambda s: s[:-1]),
        "lift, GPT-2: 11 finite numbers": curves(l=lambda s: np.where(s == 0, np.nan, s)),
        "off target, CRATE: 11 finite numbers": curves(K=lambda s: "a parabola"),
        "off target, GPT-2 is missing": lambda strengths: {
            key: value for key, value in curves()(strengths).items() if key != "off target, GPT-2"
        },
        "does it end in `return`": lambda strengths: None,
    },
    "11.F": WRONG_EXPERIMENTS,
}
