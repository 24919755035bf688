"""Checks of the exercises of chapter 11: lift, off-target divergence, an auto-encoder spliced in, cost, curves."""

from collections.abc import Callable
from decimal import Decimal
from functools import partial, wraps

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy
from torch import Tensor, nn

from cratelab.checks.grading import CheckFailed, also, as_tensor, grade, predict, random
from cratelab.checks.hunting import judge
from cratelab.checks.push_curves import STRENGTHS, push_curves


def _pushed(n: int, v: int, k: int, seed: int, shift: float = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, v) before and after a push that raises k targets; `shift` is added to those of the targets."""
    logits, push = 2 * random(n, v, seed=seed), random(v, seed=seed + 1)
    targets = torch.zeros(v, dtype=torch.bool, device="cpu")
    targets[push.topk(k).indices] = True
    logits = logits + shift * targets
    return logits, logits + push * (1 + random(n, 1, seed=seed + 2).abs()) + 0.3 * random(n, v, seed=seed + 3), targets


PUSHES = [_pushed(5, 20, 4, seed=1), _pushed(7, 12, 3, seed=11), _pushed(3, 30, 9, seed=21)]


def lift(function: Callable[[Tensor, Tensor, Tensor], float]) -> None:
    """Exercise 11.A: the lift of a set, against sums of probabilities in decimal arithmetic."""

    mistakes = {
        "the mean of log p over the words of T: add their probabilities, then take the logarithm": _of_log_probs(
            lambda p, q, T: (q - p)[:, T].mean()
        ),
        "the sum of log p over the words of T: add their probabilities, then take the logarithm": _of_log_probs(
            lambda p, q, T: (q - p)[:, T].sum(1).mean()
        ),
        "the probability is averaged over positions before the logarithm: average last": _of_log_probs(
            lambda p, q, T: np.log(_mass(q, T).mean() / _mass(p, T).mean())
        ),
        "the mean ratio of probabilities: the lift is the mean of its logarithm": _of_log_probs(
            lambda p, q, T: (_mass(q, T) / _mass(p, T)).mean()
        ),
        "the logarithm of the mean ratio: average the logarithms": _of_log_probs(
            lambda p, q, T: np.log((_mass(q, T) / _mass(p, T)).mean())
        ),
        "the mean difference of probabilities: the lift is one of logarithms": _of_log_probs(
            lambda p, q, T: (_mass(q, T) - _mass(p, T)).mean()
        ),
        "these are log odds, p(T) against the rest: log p(T) is asked for": _of_log_probs(
            lambda p, q, T: (_odds(q, T) - _odds(p, T)).mean()
        ),
        "the logits are not normalised: a constant added to all of them would be a lift": _unnormalised,
        "the sign is reversed: a set that becomes likelier has a positive lift": lambda *case: -_decimal_lift(*case),
        "in bits: take the natural logarithm": lambda *case: _decimal_lift(*case) / np.log(2),
        "summed over positions: take their mean": lambda *case: _decimal_lift(*case) * len(case[0]),
    }
    rules = _extremes(_decimal_lift, "Stay in logarithms, log_softmax and logsumexp")
    grade(function, PUSHES, _decimal_lift, "decimal arithmetic", mistakes, rules=rules)


def _extremes(oracle: Callable, advice: str) -> list[Callable]:
    """Rules: targets that are hopeless, certain, or first the one and then the other, and words that are hopeless."""
    words = {"are so rare that p(T) is 0": -900, "are so likely that p(T) is 1": 900, "leave only 1e-14 to others": 40}
    cases = {text: [_pushed(4, 10, k, seed=31 + k, shift=shift) for k in (1, 2, 8)] for text, shift in words.items()}
    logits, steered, targets = _pushed(3, 9, 2, seed=51, shift=-800)
    cases["are first so rare that p(T) is 0 and then so likely that it is 1, or the reverse"] = [
        (logits, steered + 1700 * targets, targets),
        (steered + 1700 * targets, logits, targets),
    ]
    rare = torch.arange(12, device="cpu") % 3 == 0
    cases["are likely, and single words so rare that their probability is 0"] = [
        (logits - 1000 * rare, steered - 1000 * rare, targets)
        for logits, steered, targets in (_pushed(5, 12, 4, seed=seed) for seed in (61, 62))
    ]
    return [
        also(f"the targets {text} in floating point. {advice}", *each, oracle=oracle, rtol=1e-6, atol=1e-6)
        for text, each in cases.items()
    ]


def _decimal_lift(logits: Tensor, steered: Tensor, targets: Tensor) -> float:
    def log_share(row: list[float]) -> Decimal:
        weights = [Decimal(x).exp() for x in row]
        return (sum(w for w, chosen in zip(weights, targets.tolist(), strict=True) if chosen) / sum(weights)).ln()

    pairs = zip(logits.tolist(), steered.tolist(), strict=True)
    gains = [log_share(after) - log_share(before) for before, after in pairs]
    return float(sum(gains) / len(gains))


def _of_log_probs(of: Callable) -> Callable:
    """`of` log p and log p′ of all words (n, v), and the targets."""
    return lambda logits, steered, T: of(log_softmax(logits.numpy(), 1), log_softmax(steered.numpy(), 1), T.numpy())


def _mass(p: np.ndarray, T: np.ndarray) -> np.ndarray:
    return np.exp(p[:, T]).sum(1)


def _odds(p: np.ndarray, T: np.ndarray) -> np.ndarray:
    return np.log(_mass(p, T) / _mass(p, ~T))


def _unnormalised(logits: Tensor, steered: Tensor, T: Tensor) -> float:
    return (logsumexp(steered[:, T].numpy(), 1) - logsumexp(logits[:, T].numpy(), 1)).mean()


def off_target(function: Callable[[Tensor, Tensor, Tensor], float]) -> None:
    """Exercise 11.B: the divergence off the targets, against scipy position by position."""

    def by_scipy(logits: Tensor, steered: Tensor, T: Tensor, base: float | None = None) -> float:
        rows = zip(logits[:, ~T].exp().numpy(), steered[:, ~T].exp().numpy(), strict=True)
        return np.mean([entropy(*row, base=base) for row in rows])

    def variant(of: Callable) -> Callable:
        """`of` p, p′ (n, v) and the words that are no targets gives terms, to be added for each position."""

        def mistake(logits: Tensor, steered: Tensor, T: Tensor) -> float:
            p, q = (np.exp(log_softmax(x.numpy(), 1)) for x in (logits, steered))
            return of(p, q, ~T.numpy()).sum(1).mean()

        return mistake

    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return p * np.log(p / q)

    def normal(p: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return p[:, rest] / p[:, rest].sum(1, keepdims=True)

    def zeroed(logits: Tensor, steered: Tensor, T: Tensor) -> float:
        rows = zip((logits * ~T).exp().numpy(), (steered * ~T).exp().numpy(), strict=True)
        return np.mean([entropy(*row) for row in rows])

    mistakes = {
        "not renormalised: p and p′ given that the word is no target sum to one outside T": variant(
            lambda p, q, rest: kl(p, q)[:, rest]
        ),
        "p is renormalised and p′ is not: both are given that the word is no target": variant(
            lambda p, q, rest: kl(normal(p, rest), q[:, rest])
        ),
        "p′ is renormalised and p is not: both are given that the word is no target": variant(
            lambda p, q, rest: kl(p[:, rest], normal(q, rest))
        ),
        "weighted by the probability outside T: K has no such weight": variant(
            lambda p, q, rest: kl(normal(p, rest), normal(q, rest)) * p[:, rest].sum(1, keepdims=True)
        ),
        "T is not removed: this is the divergence of everything, the lift that was ordered too": variant(
            lambda p, q, rest: kl(p, q)
        ),
        "the divergence inside T: it is the other words that count": variant(
            lambda p, q, rest: kl(normal(p, ~rest), normal(q, ~rest))
        ),
        "the divergence is reversed: the expectation is under p, the model as it is": variant(
            lambda p, q, rest: kl(normal(q, rest), normal(p, rest))
        ),
        "p and p′ are averaged over positions first: average the divergences": variant(
            lambda p, q, rest: kl(normal(p, rest).mean(0, keepdims=True), normal(q, rest).mean(0, keepdims=True))
        ),
        "in bits: take the natural logarithm": partial(by_scipy, base=2),
        "summed over positions: take their mean": lambda *case: by_scipy(*case) * len(case[0]),
        "averaged over words: a divergence is their sum, averaged over positions": lambda *case: (
            by_scipy(*case) / int((~case[2]).sum())
        ),
        "the logits of T are set to 0, which leaves them in: take them out": zeroed,
    }
    advice = "Leave the targets' logits out, stay in logarithms, and do not divide by 1 - p(T)"
    rules = _extremes(_decimal_divergence, advice)
    grade(function, PUSHES, by_scipy, "scipy, position by position", mistakes, rules=rules)


def _decimal_divergence(logits: Tensor, steered: Tensor, targets: Tensor) -> float:
    def normal(row: list[float]) -> list[Decimal]:
        weights = [Decimal(x).exp() for x in row]
        return [weight / sum(weights) for weight in weights]

    rows = zip(logits[:, ~targets].tolist(), steered[:, ~targets].tolist(), strict=True)
    pairs = [(normal(before), normal(after)) for before, after in rows]
    return float(
        sum(p * (p / q).ln() for before, after in pairs for p, q in zip(before, after, strict=True)) / len(pairs)
    )


def _encoder(n: int, h: int, m: int, seed: int, feature: int, value: float) -> tuple:
    shapes = (n, h), (h, m), (m,), (m, h), (h,)
    return *(random(*shape, seed=seed + i) for i, shape in enumerate(shapes)), feature, value


SPLICES = [
    _encoder(6, 5, 8, 1, 3, 2.5),
    _encoder(9, 4, 7, 11, 0, 0.0),
    _encoder(5, 8, 6, 21, 5, 4.0),
    _encoder(7, 3, 5, 31, 1, -1.5),  # below 0, where no ReLU gets
    _encoder(1, 4, 4, 41, 2, 1.0),
]


def spliced(function: Callable[..., Tensor]) -> None:
    """Exercise 11.C: an auto-encoder spliced in and one feature set, against torch's layers and a push by one row."""

    @torch.no_grad()
    def layers(
        x: Tensor,
        A: Tensor,
        c: Tensor,
        W: Tensor,
        b: Tensor,
        j: int,
        value: float,
        add: bool = False,
        act: type = nn.ReLU,
        firing: bool = False,
    ) -> Tensor:
        encoder, decoder = nn.Linear(*A.shape), nn.Linear(*W.shape)
        encoder.load_state_dict({"weight": A.mT, "bias": c})
        decoder.load_state_dict({"weight": W.mT, "bias": b})
        code = act()(encoder.double()(x))
        change = value - code[:, j] * (not add)
        if firing:
            change = change * (code[:, j] > 0)
        push = torch.outer(change, W[j])  # what one feature's row adds
        return torch.stack([decoder.double()(code) + push, x + push])

    def variant(of: Callable) -> Callable:
        """`of` x, Dec(f), Dec(f′) and b gives both results."""

        def mistake(x: Tensor, A: Tensor, c: Tensor, W: Tensor, b: Tensor, j: int, value: float) -> Tensor:
            steered, kept = layers(x, A, c, W, b, j, value)
            return torch.stack(of(x, steered - (kept - x), steered, b))

        return mistake

    mistakes = {
        "the error is that of the edited code: then Dec(f′) cancels and steering does nothing": variant(
            lambda x, copy, steered, b: (steered, x)
        ),
        "the error term is dropped: the second is the first again": variant(
            lambda x, copy, steered, b: (steered, steered)
        ),
        "the bias b counts twice with the error term: it is part of Dec(f), which is subtracted": variant(
            lambda x, copy, steered, b: (steered, steered + x - (copy - b))
        ),
        "the bias b is missing: Dec(f′) has it": variant(lambda x, copy, steered, b: (steered - b, steered + x - copy)),
        "the bias b is missing from Dec(f′) in both": variant(
            lambda x, copy, steered, b: (steered - b, steered - b + x - copy)
        ),
        "the error has the wrong sign: what the copy has lost is x − Dec(f)": variant(
            lambda x, copy, steered, b: (steered, steered + copy - x)
        ),
        "the whole of x is added to Dec(f′): only what the copy has lost": variant(
            lambda x, copy, steered, b: (steered, steered + x)
        ),
        "only the error is left in the second: Dec(f′) is missing": variant(
            lambda x, copy, steered, b: (steered, x - copy)
        ),
        "the two are exchanged: first without error term": variant(
            lambda x, copy, steered, b: (steered + x - copy, steered)
        ),
        "the feature is not edited: set it to the value at all tokens": variant(lambda x, copy, steered, b: (copy, x)),
        "the feature is set where it fires: set it at all tokens": partial(layers, firing=True),
        "the value is added to the feature: set it": partial(layers, add=True),
        "negative features are kept: the code is max(0, xA + c)": partial(layers, act=nn.Identity),
        "the feature is set before the ReLU, or rectified again: a value below 0 stays below 0": lambda *case: layers(
            *case[:-1], max(case[-1], 0)
        ),
    }

    @wraps(function)
    def stacked(*case: object) -> object:
        answer, (n, h) = function(*case), case[0].shape
        if getattr(answer, "shape", None) in ((2 * n, h), (n, 2 * h)) or isinstance(answer, (dict, set)):
            raise CheckFailed(
                f"{function.__name__}: the two are not stacked; torch.stack([without, with]) has the shape (2, n, h)"
            )
        return answer

    grade(stacked, SPLICES, layers, "torch's layers and a push along one row of W", mistakes)


def _curves(s: int, m: int, seed: int, level: float) -> tuple[Tensor, Tensor, float]:
    """Lifts (s, m) that rise, in half of the neurons fall again at the end, and start high in one; and costs."""
    steps, ends = random(s, m, seed=seed).abs(), torch.arange(m, device="cpu") % 2
    lift, cost = steps.cumsum(0) - 0.5, random(s, m, seed=seed + 1).abs()
    lift[-2:] -= ends * torch.tensor([[1.0], [3.0]], dtype=torch.float64, device="cpu")
    lift[0, 0], lift[:, 1:3] = level + 0.5, 0.2 * lift[:, 1:3]
    return lift, cost, level


CURVES = [_curves(6, 12, 1, 1.3), _curves(5, 9, 11, 1.1), _curves(8, 16, 21, 2.2)]
# Lifts that dip before they reach the level 1, or fall at once; that reach it exactly in a row; two rows only
_DIPS = [
    [0.0, 0.9, 0.2, 1.5, 2.0],
    [0.5, -0.7, 0.8, 0.1, 1.1],
    [0.0, 0.4, 1.0, 0.6, 0.8],
    [1.0, 0.3, 0.2, 0.9, 3.0],
    [0.0, 0.9, 0.9, 0.9, 1.0],
    [-1.0, -2.0, -3.0, 0.95, 0.99],
    [0.0, 1.4, 0.2, 0.3, 1.2],
]
CURVES.append((torch.tensor(_DIPS, dtype=torch.float64, device="cpu").mT, random(5, 7, seed=31), 1.0))
CURVES.append((random(2, 6, seed=41), random(2, 6, seed=42), 0.25))


def cost_at(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 11.D: cost where a lift is first reached, against a search for the root, neuron by neuron."""

    nevers = {
        "a neuron that never reaches the lift is extrapolated: its cost is infinite": _extrapolated,
        "a neuron that never reaches the lift gets the cost of its last row: it is infinite": lambda x, y, _: y[-1],
        "a neuron that never reaches the lift gets the cost of its first row, as argmax of nothing is 0: it is "
        "infinite": lambda x, y, _: y[0],
        "a neuron that never reaches the lift costs 0: its cost is infinite": lambda x, y, _: 0,
    }
    mistakes = {message: partial(_interpolated, never=never) for message, never in nevers.items()}
    mistakes |= {
        "the cost of the first row that reaches the lift: interpolate from the row before": partial(
            _interpolated, between=lambda share, low, high: high
        ),
        "the cost of the row before the lift is reached: interpolate to the next": partial(
            _interpolated, between=lambda share, low, high: low
        ),
        "the nearer row's cost: interpolate between the two": partial(
            _interpolated, between=lambda share, low, high: high if share > 0.5 else low
        ),
        "half-way between the two rows: the share of the way follows from the lift": partial(
            _interpolated, between=lambda share, low, high: (low + high) / 2
        ),
        "interpolated from the wrong end: the share is counted from the row before": partial(
            _interpolated, between=lambda share, low, high: high + share * (low - high)
        ),
        "where the lift is reached in the first row, the row before is taken, and −1 is the last": partial(
            _interpolated, start=lambda y: y[-1]
        ),
        "a lift reached in the first row costs nothing: its cost is that of the first row": partial(
            _interpolated, start=lambda y: 0
        ),
        "the last time that the lift is passed: the first is asked for": partial(_interpolated, last=True),
        "np.interp needs lifts that rise all the way, and repeats the last cost where the lift is never reached": (
            _looked_up
        ),
        "neurons that have reached the lift in the first row are passed over: their cost is that of the first row": (
            _crossed
        ),
        "a lift that is exactly the level has reached it": partial(_interpolated, exactly=False),
        "a dip between is left out: interpolate from the row just before, not from the highest so far": _from_highest,
        "the cheapest row that reaches the lift: interpolate where it is first reached": _cheapest,
    }
    grade(function, CURVES, _searched, "a search for the root, neuron by neuron", mistakes)


def _searched(lift: Tensor, cost: Tensor, level: float) -> np.ndarray:
    rows, out = np.arange(len(lift)), []
    for x, y in zip(lift.numpy().T, cost.numpy().T, strict=True):
        if x.max() < level:
            out.append(np.inf)
        elif x[0] >= level:
            out.append(y[0])
        else:
            at = next(i for i in rows if x[i] >= level)
            root = brentq(lambda t, x=x: np.interp(t, rows, x) - level, at - 1, at, xtol=1e-14)
            out.append(np.interp(root, rows, y))
    return np.array(out)


def _interpolated(
    lift: Tensor,
    cost: Tensor,
    level: float,
    never: Callable = lambda x, y, level: np.inf,
    start: Callable = lambda y: y[0],
    between: Callable = lambda share, low, high: low + share * (high - low),
    last: bool = False,
    exactly: bool = True,
) -> np.ndarray:
    out = []
    for x, y in zip(lift.numpy().T, cost.numpy().T, strict=True):
        there = x >= level if exactly else x > level
        rising = np.flatnonzero(there & ~np.append(False, there[:-1]))
        if len(rising) == 0:
            out.append(never(x, y, level))
            continue
        i = rising[0]
        if last:  # where the lift is passed for the last time, up or down
            i = max(k for k in range(len(x)) if k == 0 or (x[k] >= level) != (x[k - 1] >= level))
        if i == 0:
            out.append(start(y))
        else:
            out.append(between((level - x[i - 1]) / (x[i] - x[i - 1]), y[i - 1], y[i]))
    return np.array(out)


def _from_highest(lift: Tensor, cost: Tensor, level: float) -> np.ndarray:
    return _interpolated(lift.cummax(0).values, cost, level)


def _extrapolated(x: np.ndarray, y: np.ndarray, level: float) -> float:
    return y[-2] + (level - x[-2]) / (x[-1] - x[-2]) * (y[-1] - y[-2])


def _cheapest(lift: Tensor, cost: Tensor, level: float) -> np.ndarray:
    return np.where(lift >= level, cost, np.inf).min(0)


def _looked_up(lift: Tensor, cost: Tensor, level: float) -> list[float]:
    return [np.interp(level, x, y) for x, y in zip(lift.numpy().T, cost.numpy().T, strict=True)]


def _crossed(lift: Tensor, cost: Tensor, level: float) -> list[float]:
    out = []
    for x, y in zip(lift.numpy().T, cost.numpy().T, strict=True):
        i = next((i for i in range(1, len(x)) if x[i - 1] < level <= x[i]), None)
        out.append(np.inf if i is None else np.interp(level, x[i - 1 : i + 1], y[i - 1 : i + 1]))
    return out


def drawn(function: Callable[[tuple[float, ...]], dict[str, list[float]]], reasons: bool = False) -> None:
    """Exercise 11.E: what drawn curves have in common with those of packaged models, feature by feature."""
    measured, highest = push_curves()
    answer = predict(function, STRENGTHS, keys=measured)
    said = {key: _curve(value, f"{function.__name__}: {key}") for key, value in answer.items()}
    wrong, why = {}, {}
    for feature, reason in _FEATURES.items():
        pairs = zip(_seen(feature, said, highest), _seen(feature, measured, highest), strict=True)
        off = next((pair for pair in pairs if not pair[0][2] <= pair[0][1] <= pair[0][3]), None)
        wrong[feature] = (
            off and f": {off[0][0]} is {off[0][1]:z.3g} as you draw it, {off[1][1]:z.3g} measured; {reason}"
        )
        why[feature] = reason
    judge(function, wrong, reasons, why)


def _curve(value: object, where: str) -> np.ndarray:
    try:
        curve = as_tensor(value).numpy()
    except Exception:  # whatever a library says of what is no array of real numbers
        curve = np.zeros(0)
    if curve.shape != (len(STRENGTHS),) or not np.isfinite(curve).all():
        raise CheckFailed(f"{where}: {len(STRENGTHS)} finite numbers are needed, one for each strength")
    return curve


_FEATURES = {
    "rest": "if nothing is added nothing changes",
    "sign": "a push up makes the targets likelier and a push down less likely; a divergence is never negative, and is "
    "0 only if nothing has changed",
    "small": "nearly no push: logits move in proportion to it, and so does the lift. A divergence has its minimum at "
    "0 and no slope there, so it goes with the square: half the push, a quarter of the damage",
    "mirror": "nearly no push: what is in proportion turns its sign with the push, and a square does not",
    "strong": "the last LayerNorm divides by the standard deviation, which grows with the push. In the end the state "
    "is the atom, whatever stood there before, and more of it is the same: the lift stays nearly "
    "where it is, and what the divergence still gains is far less than in proportion to the push",
    "ceiling": "p'(T) is at most 1, so the lift is at most -log p(T)",
    "model": "nothing goes round CRATE's ISTA: the state is a sum of atoms, and one more is a larger part of it than "
    "in GPT-2's stream, to which all layers have added",
}


def _seen(feature: str, curves: dict[str, np.ndarray], highest: dict[str, float]) -> list[tuple]:
    """What a feature looks at in curves: a name, a number, and the least and the most that this may be."""

    def at(key: str, strength: float) -> float:
        return curves[key][STRENGTHS.index(strength)]

    def ratio(key: str, above: float, below: float, least: float, most: float) -> tuple:
        with np.errstate(all="ignore"):
            return f"{key} at {above:g} divided by that at {below:g}", at(key, above) / at(key, below), least, most

    strengths, tiny, largest = np.array(STRENGTHS), 1e-9, np.inf
    lifts, costs = ([f"{what}, {label}" for label in highest] for what in ("lift", "off target"))
    if feature == "rest":
        return [(f"{key} at 0", at(key, 0.0), -1e-3, 1e-3) for key in lifts + costs]
    if feature == "sign":
        up = [(f"the least {key} of a push up", curves[key][strengths > 0].min(), tiny, largest) for key in lifts]
        down = [
            (f"the largest {key} of a push down", curves[key][strengths < 0].max(), -largest, -tiny) for key in lifts
        ]
        return (
            up
            + down
            + [(f"the least {key} of a push", curves[key][strengths != 0].min(), tiny, largest) for key in costs]
        )
    if feature == "small":
        return [ratio(key, 0.1, 0.05, 1.6, 2.5) for key in lifts] + [ratio(key, 0.1, 0.05, 3, 5.5) for key in costs]
    if feature == "mirror":
        return [ratio(key, -0.1, 0.1, -1.5, -0.7) for key in lifts] + [ratio(key, -0.1, 0.1, 0.7, 1.5) for key in costs]
    if feature == "strong":
        return [ratio(key, 64.0, 8.0, 0.8, 1.8) for key in lifts] + [ratio(key, 64.0, 8.0, 0.8, 6) for key in costs]
    if feature == "ceiling":
        return [(f"the largest {key}", curves[key].max(), 0, 1.05 * highest[key.split(", ")[1]]) for key in lifts]
    with np.errstate(all="ignore"):
        return [
            (
                f"{what} at 1, CRATE's divided by GPT-2's",
                at(f"{what}, CRATE", 1.0) / at(f"{what}, GPT-2", 1.0),
                1.01,
                largest,
            )
            for what in ("lift", "off target")
        ]
