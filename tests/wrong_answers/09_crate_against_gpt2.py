"""Wrong answers to the exercises of chapter 9: what a check says -> a function with that mistake."""

import torch
from scipy import stats
from scipy.stats import t as student
from wrong_answers.asked import at_first, on_request


def two_numbers(
    live=lambda defined, drop: defined.sum(1) if drop else defined.shape[1],
    keep=lambda S, last: S if last else S[:-1],
    spread=lambda S: S.var(correction=0),
    mask=True,
    scale=100.0,
):
    """Mean and variance over layers with another count, choice of layers, or spread."""

    def function(scores, defined, last, drop):
        S = keep(scale * (scores * defined if mask else scores).sum(1) / live(defined, drop), last)
        return S.mean(), spread(S)

    return function


def at_once(scores, defined, last, drop):
    """The mean over all neurons of all layers."""
    stop = len(scores) if last else len(scores) - 1
    scores, alive = (scores * defined)[:stop], defined[:stop]
    mean = 100 * scores.sum() / (alive.sum() if drop else alive.numel())
    return mean, two_numbers()(scores, alive, True, drop)[1]


def of_neurons(scores, defined, last, drop):
    stop = len(scores) if last else len(scores) - 1
    each = 100 * (scores[:stop][defined[:stop]] if drop else scores[:stop] * defined[:stop])
    return two_numbers()(scores, defined, last, drop)[0], each.var(correction=0)


def interval(quantile=lambda n: student.ppf(0.975, n - 1), correction=1, divide=lambda n: n**0.5, sign=1, flip=1):
    """The interval with another quantile, standard deviation or divisor."""

    def function(crate, gpt2):
        d = sign * (crate - gpt2)
        half = flip * quantile(len(d)) * d.std(correction=correction) / divide(len(d))
        return d.mean() - half, d.mean() + half

    return function


def unpaired(pooled):
    def function(crate, gpt2):
        n = len(crate)
        a, b = crate.var() / n, gpt2.var() / n
        df = 2 * n - 2 if pooled else float((a + b) ** 2 / ((a**2 + b**2) / (n - 1)))
        half = student.ppf(0.975, df) * (a + b).sqrt()
        return crate.mean() - gpt2.mean() - half, crate.mean() - gpt2.mean() + half

    return function


def bootstrap(
    draw=lambda scores, picks: scores.gather(1, picks.transpose(0, 1).flatten(1)).reshape(len(scores), len(picks), -1),
    average=lambda drawn: drawn.mean((0, 2)),
    spread=lambda means: means.std(correction=0),
):
    """The bootstrap with another way to draw (layers, resamples, neurons), to average, or to measure the spread."""
    return lambda scores, picks: spread(average(draw(scores, picks)))


def first_picks(scores, picks):
    return scores[:, picks[:, 0]]


def apart(off=lambda v, n, h: v / h, correction=1, within=1, sign=-1, over=lambda s, c: s.var(1, correction=c).mean()):
    """The variance over seeds, and what is taken off it."""

    def function(scores):
        n, h = scores.shape
        return scores.mean(1).var(correction=correction) + sign * off(over(scores, within), n, h)

    return function


def closed_form(scores, picks):
    return (scores.var(1, correction=0).sum() / scores.numel() / len(scores)).sqrt()


def not_zero(scores, defined, last, drop):
    return two_numbers()(scores, defined & (scores != 0), last, drop)


def draws(**changed):
    """Right curves but for some, checked with reasons."""
    drawn = {"trained": [30, 40, 48, 55, 60, 62], "random-only": [15, 20, 26, 31, 35, 37]}
    drawn |= {"untrained": [18, 26, 34, 40, 44, 46], "another": [1, -1, 2, 0, -2, 1], "within": [0] * 6}
    return on_request(lambda: drawn | changed)


WRONG = {
    "9.A": {
        "this is the sample variance": two_numbers(spread=lambda S: S.var()),
        "over all neurons at once": at_once,
        "the variance is one of neurons": of_neurons,
        "this is the standard deviation": two_numbers(spread=lambda S: S.std(correction=0)),
        "the factor 100 is missing": two_numbers(scale=1.0),
        "100 times too small": two_numbers(spread=lambda S: S.var(correction=0) / 100),
        "always count as zero": two_numbers(live=lambda defined, drop: defined.shape[1]),
        "always dropped": two_numbers(live=lambda defined, drop: defined.sum(1)),
        "entries that are not scores": two_numbers(mask=False, live=lambda defined, drop: defined.shape[1]),
        "always in": two_numbers(keep=lambda S, last: S),
        "always out": two_numbers(keep=lambda S, last: S[:-1]),
        "the first layer is left out": two_numbers(keep=lambda S, last: S if last else S[1:]),
        "0 · nan is NaN": two_numbers(),
        "0 · inf is NaN": lambda scores, *rest: two_numbers()(scores.nan_to_num(0, posinf=torch.inf), *rest),
        "No common mistake": not_zero,
        "one layer that counts has a mean": two_numbers(
            spread=lambda S: S.var() * (len(S) - 1) / len(S) if len(S) > 1 else torch.nan
        ),
    },
    "9.B": {
        "seeds are taken for unrelated.*seed by seed$": unpaired(pooled=False),
        "seeds are taken for unrelated.*pooled variance": unpaired(pooled=True),
        "1.96 belongs to a known spread": interval(quantile=lambda n: 1.96),
        "1.96 belongs to a normal distribution": interval(quantile=lambda n: student.ppf(0.975, 1e12)),
        "divided by n: ": interval(divide=lambda n: n),
        "not divided by √n": interval(divide=lambda n: 1),
        "the standard deviation divides by n": interval(correction=0),
        "has n degrees of freedom": interval(quantile=lambda n: student.ppf(0.975, n)),
        "the quantile at 0.95": interval(quantile=lambda n: student.ppf(0.95, n - 1)),
        "this is GPT-2's lead": interval(sign=-1),
        "low and high are exchanged": interval(flip=-1),
        "is right, but calls ttest_rel: ": lambda crate, gpt2: stats.ttest_rel(crate, gpt2).confidence_interval(0.95),
        "is right, but calls ttest_1samp: ": lambda crate, gpt2: stats.ttest_1samp(crate - gpt2, 0).confidence_interval(
            0.95
        ),
    },
    "9.C": {
        "divided by √B": lambda scores, picks: bootstrap()(scores, picks) / len(picks) ** 0.5,
        "this is the variance": bootstrap(spread=lambda means: means.var(correction=0)),
        "divided by B − 1": bootstrap(spread=lambda means: means.std()),
        "all neurons are drawn from the first layer": lambda scores, picks: (
            scores.flatten()[picks].mean((1, 2)).std(correction=0)
        ),
        "all layers use the picks of the first": bootstrap(draw=first_picks),
        "the spread of the layers' means": bootstrap(average=lambda drawn: drawn.mean(2)),
        "the spread of single neurons": bootstrap(average=lambda drawn: drawn),
        "half the width": bootstrap(spread=lambda means: 1.96 * means.std(correction=0)),
        "Are just these picks used": closed_form,
        "some of the resamples .* each as often": lambda scores, picks: bootstrap()(scores, picks.unique(dim=0)),
    },
    "9.D": {
        "nothing is taken off": apart(off=lambda v, n, h: 0.0),
        "the variance of one neuron is taken off": apart(off=lambda v, n, h: v),
        r"1/\(n h\)": apart(off=lambda v, n, h: v / (n * h)),
        "the neurons' part is added": apart(sign=1),
        "the variance over seeds divides by n": apart(correction=0),
        "the variance over neurons divides by h": apart(within=0),
        "both variances": apart(correction=0, within=0),
        "over all networks together": apart(over=lambda s, c: s.var()),
        "this is the bootstrap's part": lambda scores: scores.var(1).mean() / scores.shape[1],
        "cut off at 0": lambda scores: apart()(scores).clamp(min=0),
    },
    "9.E": {
        "curves: 5 of 7 right. Go through": at_first(draws(another=[9] * 6, within=[5, 10, 15, 20, 25, 30])),
        r"(?s)^curves: 5 of 7 right\.\n.*chance: .*context: ": draws(another=[9] * 6, within=[5, 10, 15, 20, 25, 30]),
        r"(?s)^curves: 2 of 7 right\.\ndirection: .*bend: .*ceiling: .*order: .*control: ": draws(
            **dict.fromkeys(("trained", "random-only", "untrained", "another", "within"), [0] * 6)
        ),
        r"6 of 7 right\.\ndirection: .* rise and never fall": draws(trained=[30, 40, 48, 55, 62, 52]),
        r"6 of 7 right\.\nbend: words come by falling strength": draws(trained=[30, 34, 38, 45, 55, 75]),
        r"6 of 7 right\.\nceiling: the trained curve ends well below 100": draws(
            trained=[35, 55, 72, 85, 94, 97], untrained=[20, 30, 40, 48, 52, 55]
        ),
        r"6 of 7 right\.\norder: with the same explanations": draws(**{"random-only": [32, 42, 50, 57, 62, 64]}),
        r"6 of 7 right\.\ncontrol: an untrained network is below": draws(untrained=[0, 2, 4, 5, 6, 6.5]),
        r"6 of 7 right\.\nchance: the table of another neuron": draws(another=[10, 14, 18, 22, 24, 25]),
        r"6 of 7 right\.\ncontext: within tokens every table of words has 0": draws(within=[5, 9, 12, 16, 18, 20]),
        "trained is to be a list of 6 numbers, for 1, 2, 4, 8, 16, 32 words": draws(trained=[30, 40, 50]),
        "within is to be a list of 6 numbers": draws(within=0),
        "within: a score × 100 lies between": draws(within=[0, 0, 0, 0, 0, torch.nan]),
        "trained: a score × 100 lies between": draws(trained=[300, 400, 480, 550, 600, 620]),
        "a number is needed; got a str": draws(another=["0"] * 6),
        "should return a dict with the keys trained, random-only, .*; it returns None": lambda: None,
        "scores are drawn × 100": draws(
            **{"trained": [0.3, 0.4, 0.5, 0.55, 0.6, 0.62], "random-only": [0.1] * 6},
            untrained=[0.2] * 6,
            another=[0.0] * 6,
        ),
    },
}
