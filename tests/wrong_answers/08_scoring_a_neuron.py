"""Wrong answers to the exercises of chapter 8: what a check says -> a function with that mistake."""

import math

import numpy as np
import torch
from einops import rearrange
from scipy.stats import pearsonr
from wrong_answers.asked import at_first, hunts, in_place_of, on_request

from cratelab.checks import own_sentence


def say(**changed):
    """The right answers but for one."""
    right = {"louder": "same", "offset": "same", "flat": "undefined", "silence": "up", "surprise": "down"}
    right |= {"dropped": "up", "zeroed": "down"}
    return on_request(lambda: right | changed)


def table(
    scale=lambda E, V: E.max(),
    integer=torch.floor,
    clamp=lambda a: a.clamp(min=0),
    over=torch.mean,
    unseen=lambda known: 0.0,
    guard=True,
):
    """The simulation from a table with another scale, rounding, mean or answer to unknown words."""

    def function(words_e, activations_e, words_v, activations_v):
        M = scale(activations_e, activations_v)
        ratio = 10 * clamp(activations_e) / M
        if guard:
            ratio = torch.where(M > 0, ratio, 0.0)
        n = integer(ratio).clamp(max=10)
        known = {x: float(over(n[words_e == x])) for x in words_e.unique().tolist()}
        return torch.tensor([[known.get(x, unseen(known)) for x in row] for row in words_v.tolist()])

    return function


def overwritten(words_e, activations_e, words_v, activations_v):
    M = activations_e.max()
    n = (10 * activations_e.clamp(min=0) / M).floor() if M > 0 else torch.zeros(words_e.shape)
    known = dict(zip(words_e.flatten().tolist(), n.flatten().tolist(), strict=True))
    return torch.tensor([[known.get(x, 0.0) for x in row] for row in words_v.tolist()])


def numbered(words_e, activations_e, words_v, activations_v):
    """Looks words up by their number among the words of E, as if no number were left out."""
    known = table()(words_e, activations_e, words_e.unique()[None], activations_v)[0]
    return torch.where(words_v < len(known), known[words_v.clamp(max=len(known) - 1)], 0.0)


def where_it_fires(n):
    return n[n > 0].mean() if (n > 0).any() else 0.0


def excerpts(
    explain=slice(0, 10, 2),
    validate=slice(1, 10, 2),
    ends="moved",
    leak="tokens",
    random=True,
    once=(),
    half=lambda width: width // 2,
):
    """Counts of tokens in E and V with other ranks, ends of the text, or treatment of what stands in both."""

    def function(top, others, width, n):
        counts = torch.zeros(2, n)
        windows = {0: top[explain].tolist(), 1: top[validate].tolist() + (others.tolist() if random else [])}
        for row, centres in windows.items():
            for centre in centres:
                start = centre - half(width)
                if ends == "moved":
                    start = min(max(start, 0), n - width)
                stop = start + width
                if ends == "cut":
                    start = max(start, 0)
                if leak == "windows" and row == 1 and counts[0, start:stop].any():
                    continue
                counts[row, start:stop] += 1
        if leak == "tokens":
            counts[1, counts[0] > 0] = 0
        if leak == "from E":
            counts[0, counts[1] > 0] = 0
        for row in once:
            counts[row].clamp_(max=1)
        return counts

    return function


HALVES = dict(explain=slice(5), validate=slice(5, 10))


def correlate(a, s, centre=True, tolerance=0.0):
    """Pearson's correlation of two vectors; NaN where one is constant."""
    if len(a) == 0 or a.max() - a.min() <= tolerance or s.max() - s.min() <= tolerance:
        return float("nan")
    if centre:
        a, s = a - a.mean(), s - s.mean()
    return float(a @ s / (a.norm() * s.norm()))


def summed_up(values):
    values = torch.tensor(values)
    return values.nanmean(), values.nan_to_num(0).mean(), values.isnan().double().mean()


def layer(then=summed_up, padding=False, of=correlate):
    def function(activations, simulated, present):
        rows = zip(activations, simulated, present | padding, strict=True)
        return then([of(a[here], s[here]) for a, s, here in rows])

    return function


def excerpt_by_excerpt(undefined):
    def function(activations, simulated, present):
        values = []
        for a, s, here in zip(activations, simulated, present, strict=True):
            each = torch.tensor([correlate(x[p], y[p]) for x, y, p in zip(a, s, here, strict=True)])
            values.append(float(each.nan_to_num(undefined).mean() if undefined is not None else each.nanmean()))
            if each.isnan().all():
                values[-1] = float("nan")
        return summed_up(values)

    return function


def whole_layer(activations, simulated, present):
    rho = correlate(activations[present], simulated[present])
    return rho, rho, layer()(activations, simulated, present)[2]


def by_spread(activations, simulated, present):
    """Takes a neuron for constant if its centred vector is exactly zero."""

    def of(a, s):
        a, s = a - a.mean(), s - s.mean()
        return float(a @ s / (a.norm() * s.norm()))

    return layer(of=of)(activations, simulated, present)


def silent_only(activations, simulated, present):
    def of(a, s):
        return float("nan") if not a.any() else torch.tensor(correlate(a, s)).nan_to_num(0).item()

    return layer(of=of)(activations, simulated, present)


def constant_simulation(a, s):
    """Compares extremes of the simulation, and the centred activations with 0."""
    return correlate(a, s) if (a - a.mean()).abs().sum() == 0 else _correlation(a, s)


def _correlation(a, s):
    if s.max() == s.min():
        return float("nan")
    a, s = a - a.mean(), s - s.mean()
    return float(a @ s / (a.norm() * s.norm()))


def by_library(of):
    return lambda a, s: float("nan") if a.max() == a.min() or s.max() == s.min() else float(of(a, s))


def ranks(a, s):
    def rank(x):
        return (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2

    return correlate(rank(a), rank(s))


def walk(
    ends="document",
    apart="windows",
    bar="kept",
    candidates=None,
    positive=True,
    by_place=False,
    counts=lambda a: a > 0,
    half=lambda width: width // 2,
):
    """The walk by falling activation with another rule for ends, overlaps, or when to stop."""

    def function(activations, document, width, k):
        starts, centres, refused = [], [], []
        for c in activations.argsort(descending=True).tolist()[: candidates and candidates(k)]:
            if len(starts) == k or (positive and not counts(activations[c])):
                break
            own = rearrange((document == document[c]).nonzero(), "n 1 -> n").tolist()
            low, high = (0, len(document)) if ends == "text" else (own[0], own[-1] + 1)
            start = max(c - half(width), low)
            start = start if ends == "beginning" else min(start, high - width)
            clashes = {
                "windows": any(abs(start - other) < width for other in starts + refused),
                "touching": any(abs(start - other) <= width for other in starts),
                "centres": any(abs(c - other) < width for other in centres),
                "half": any(abs(c - other) < width // 2 for other in centres),
                "same": start in starts,
                "document": any(document[c] == document[other] for other in centres),
                "nothing": False,
            }
            if not clashes[apart]:
                starts.append(start)
                centres.append(c)
            elif bar == "all":
                refused.append(start)
        starts = sorted(starts) if by_place else starts
        return torch.tensor(starts + [-1] * (k - len(starts)))

    return function


def exposing():
    top, clear = 50 + 40 * torch.arange(10), torch.full((5,), 30)
    early = torch.cat([torch.tensor([1]), top[1:]])
    return [(top, clear, 8, 500), (early, clear, 8, 500), (top, top[:5], 8, 500)]


def says(condition):
    """10 where it holds of the words before, a list, and of the word, else 0."""
    return lambda before, word: 10 * condition(before, word)


def by_heart(before, word):
    """Knows every beginning of the text that is shown, and what the neuron does at its end."""
    if not by_heart.known:
        world, start = own_sentence.text(seed=1), 0
        values = own_sentence._activations(1)[:, 1, 152].clamp(min=0)
        words = [world.vocabulary[token] for token in world.tokens]
        for i, value in enumerate((10 * values / values.max()).tolist()):
            start = start if world.document[i] == world.document[start] else i
            by_heart.known[tuple(words[start : i + 1])] = value
    return by_heart.known.get((*before, word), 0)


by_heart.known = {}


WRONG = {
    "8.A": {
        "changes_of_the_score: 5 of 7 right. Go through": at_first(say(louder="up", silence="same")),
        "louder: you say 'up', measured: 'same'.* divides by the spread": say(louder="up"),
        "offset: you say 'down', measured: 'same'.* subtracts the means": say(offset="down"),
        "flat: you say 'down', measured: 'undefined'.* 0/0": say(flat="down"),
        "silence: you say 'same', measured: 'up'.* counts as a success": say(silence="same"),
        "surprise: you say 'same', measured: 'down'.* enter squared": say(surprise="same"),
        "dropped: you say 'down', measured: 'up'.* better anyway": say(dropped="down"),
        "dropped: you say 'same', measured: 'up'.* now over others": say(dropped="same"),
        "zeroed: you say 'same', measured: 'down'.* two positive numbers become 0": say(zeroed="same"),
        'should return "up", "down", "same" or "undefined"': say(flat="nan"),
    },
    "8.B": {
        "M is taken over V": table(scale=lambda E, V: V.max()),
        "M is taken over E and V together": table(scale=lambda E, V: torch.max(E.max(), V.max())),
        "each excerpt has an M of its own": table(scale=lambda E, V: E.amax(1, keepdim=True)),
        "M is the largest absolute value": table(scale=lambda E, V: E.abs().max()),
        "negative activations are kept": table(clamp=lambda a: a),
        "M is negative where all of E is": table(
            clamp=lambda a: a, guard=False, integer=lambda x: x.floor().clamp(min=0)
        ),
        "rounded to the nearest integer": table(integer=torch.round),
        "rounded up": table(integer=torch.ceil),
        "not rounded": table(integer=lambda x: x),
        "averaged before rounding": table(integer=lambda x: x, over=lambda n: n.mean().floor()),
        "the sum, not the mean": table(over=torch.sum),
        "the largest, not the mean": table(over=torch.max),
        "the mean over places where the neuron fires": table(over=where_it_fires),
        "each word has the value of its last place": overwritten,
        "each word has the value of its first place": table(over=lambda n: n[0]),
        "a word that is not in E gets the mean of the table": table(unseen=lambda t: sum(t.values()) / len(t)),
        "numbers that are not finite": table(guard=False, scale=lambda E, V: E.clamp(min=0).max()),
        "where no activation of E is positive, the simulation is 0": table(
            scale=lambda E, V: torch.where(E.max() < 0, 1.0, E.max()), guard=False
        ),
        "No common mistake": table(scale=lambda E, V: torch.where(E.max() < 1e-4, 0.0, E.max())),
        "it gives .* No common mistake": numbered,
    },
    "8.C": {
        **hunts(exposing, (20 * torch.arange(10), torch.zeros(5, dtype=torch.long), 8, 200)),
        "the ten strongest places are ten different ones": in_place_of(
            "exposing", lambda: [(torch.full((10,), 4), torch.full((5,), 7), 2, 9)]
        ),
        "the five strongest explain and the next five validate: ranks alternate$": excerpts(**HALVES),
        "V leaks: its random windows hold tokens that stand in E$": excerpts(leak="never"),
        "split: a window at the beginning is lost, and one at the end cut short: they should be moved$": excerpts(
            ends="lost"
        ),
        "ranks alternate; and V leaks: its random windows hold tokens that stand in E$": excerpts(
            **HALVES, leak="never"
        ),
        "ranks alternate; and a window at the beginning is lost": excerpts(**HALVES, ends="lost"),
        "stand in E; and a window at the beginning is lost": excerpts(leak="never", ends="lost"),
        "ranks alternate; and V leaks.*; and a window at the beginning is lost": excerpts(
            **HALVES, leak="never", ends="lost"
        ),
        "windows are cut short at the ends": excerpts(ends="cut"),
        "a whole window leaves V": excerpts(leak="windows"),
        "the tokens leave E instead of V": excerpts(leak="from E"),
        "ranks 1, 3, 5, 7, 9 explain": excerpts(explain=slice(1, 10, 2), validate=slice(0, 10, 2)),
        "the random windows are missing": excerpts(random=False),
        "a token in two windows of V counts once": excerpts(once=[1]),
        "a token in two windows of E counts once": excerpts(once=[0]),
        "a token in two windows counts once": excerpts(once=[0, 1]),
        "a window of odd width": excerpts(half=lambda width: (width + 1) // 2),
    },
    "8.D": {
        "each excerpt is correlated on its own: string": excerpt_by_excerpt(None),
        "each excerpt is correlated on its own, and a silent one counts as 0": excerpt_by_excerpt(0.0),
        "places without text count": layer(padding=True),
        "one correlation for the whole layer": whole_layer,
        "the means are not subtracted": layer(of=lambda a, s: correlate(a, s, centre=False)),
        "these are rank correlations": layer(of=ranks),
        "count as 0 in both means": layer(then=lambda v: (summed_up(v)[1], *summed_up(v)[1:])),
        "are left out of both means": layer(then=lambda v: (summed_up(v)[0], summed_up(v)[0], summed_up(v)[2])),
        "the two means are exchanged": layer(then=lambda v: (summed_up(v)[1], summed_up(v)[0], summed_up(v)[2])),
        "the third is a number of neurons": layer(then=lambda v: (*summed_up(v)[:2], len(v) * summed_up(v)[2])),
        "the third is the share with a score": layer(then=lambda v: (*summed_up(v)[:2], 1 - summed_up(v)[2])),
        "only silent neurons are taken for undefined": silent_only,
        "the absolute values are averaged": layer(of=lambda a, s: abs(correlate(a, s))),
        "simulations that are 0.1, 0.2, … 0.9 everywhere it takes [1-9] of 9 for varying": by_spread,
        "returns numbers that are not finite": layer(then=lambda v: (torch.tensor(v).mean(), *summed_up(v)[1:])),
        "is right, but calls corrcoef: ": layer(of=by_library(lambda a, s: torch.stack([a, s]).corrcoef()[0, 1])),
        "is right, but calls corrcoef: write": layer(of=by_library(lambda a, s: np.corrcoef(a, s)[0, 1])),
        "is right, but calls pearsonr: ": layer(of=by_library(lambda a, s: pearsonr(a, s)[0])),
        "No common mistake explains": layer(of=lambda a, s: correlate(a, s) if a.max() > 0 else float("nan")),
        "what varies by 0.001 only": layer(of=lambda a, s: correlate(a, s, tolerance=0.05)),
        "what varies by 1e-05 only": layer(of=lambda a, s: correlate(a, s / s.abs().max(), tolerance=1e-4)),
        "what varies by 1e-09 only": layer(of=lambda a, s: correlate(a, s, tolerance=1e-7)),
        "activations that are 0.1, .* it takes [1-9] of 9": layer(of=constant_simulation),
        "No common mistake": layer(of=lambda a, s: correlate(a.clamp(min=0), s)),
    },
    "8.E": {
        "windows: windows overlap: one excerpt would be shown many times$": walk(apart="nothing"),
        "windows: windows cross the ends of documents$": walk(ends="text"),
        "windows: tokens count where the neuron is not positive$": walk(positive=False),
        "windows overlap.*; and windows cross": walk(apart="nothing", ends="text"),
        "windows cross.*; and tokens count": walk(ends="text", positive=False),
        "places are kept apart instead of windows": walk(apart="centres"),
        "places half a window apart": walk(apart="half"),
        "only windows with one and the same start": walk(apart="same"),
        "one window a document": walk(apart="document"),
        "a window that was refused bars others": walk(bar="all"),
        "the k strongest tokens are chosen first": walk(candidates=lambda k: k),
        "it gives -1 where": walk(candidates=lambda k: 20 * k),
        "windows are moved at the beginning of a document only": walk(ends="beginning"),
        "by place: the strongest comes first": walk(by_place=True),
        "where the neuron is exactly 0": walk(counts=lambda a: a >= 0),
        "No common mistake": walk(counts=lambda a: a > 1e-3),
        "a window of odd width": walk(half=lambda width: (width + 1) // 2),
        "windows that stand side by side": walk(apart="touching"),
    },
    "8.F": {
        "says 3 everywhere, and a constant has no score": says(lambda before, word: 0.3),
        "is turned round: its score on the text shown is -0.50": says(lambda before, word: word != "."),
        "the same number wherever it stands: 0.50 .* gets more than 0.51. What has": says(lambda b, word: word == "."),
        r"gives a word the same number wherever it stands: -0\.\d+ .* On which word": says(lambda b, word: word == ","),
        r"the same number wherever it stands: 0\.\d+ on the text shown, where no list": says(
            lambda before, word: {".": 0.9, ":": 0.2}.get(word, 0)
        ),
        "0.55 is asked for. .* too wide, as at the last of these words: .* beads . let us count the$": says(
            lambda before, word: "count" in before
        ),
        "It is too narrow, as at the last of these words: ": says(
            lambda before, word: word == "." and "leaves" in before[-6:]
        ),
        r"1\.00 on the text shown, but 0\.40 on fresh text: some of it held": by_heart,
        "activation, at '<begin>' after 0 words: a number from 0 to 10 is needed; got nan": says(lambda *_: math.nan),
        "at '.' after 5 words: a number from 0 to 10 is needed; got 20": says(lambda b, word: 2 * (word == ".")),
        "raises IndexError for before of length 0, word = '<begin>', where a number from 0 to 10 was expected": (
            lambda before, word: 9 * (before[-1] == word)
        ),
        "a number is needed; got None": lambda before, word: None,
        "a number is needed; got a str": lambda before, word: "strong",
        "sentence should return a sentence of 4 to 60 words .* returns 2 words": in_place_of(
            "sentence", lambda: "full stops"
        ),
        "sentence should return a sentence of 4 to 60 words .* returns None": in_place_of("sentence", lambda: None),
        "4 to 60 words .* returns 6 words, 1 of them different": in_place_of("sentence", lambda: "x x x x x x"),
    },
}
