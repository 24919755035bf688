"""Checks of the exercises of chapter 8: excerpts, a table of words, and what a score makes of them."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from cratelab.checks import watching
from cratelab.checks.grading import CheckFailed, also, ask, grade, predict, random, unmended
from cratelab.checks.hunting import COUNT, hunt, judge


def _words(*shape: int, n: int, seed: int) -> Tensor:
    """Random words below n, the low ones frequent."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return (n * torch.rand(*shape, generator=generator, device="cpu") ** 2).long()


def _grid(*shape: int, seed: int, factor: float = 1, shift: float = 0) -> Tensor:
    """Normal numbers in steps of 1/1024, so that ten times an activation is exact."""
    return ((factor * random(*shape, seed=seed) + shift) * 1024).round() / 1024


TABLES = [
    (_words(5, 12, n=20, seed=1), _grid(5, 12, seed=2), _words(4, 12, n=30, seed=3), _grid(4, 12, seed=4, factor=2)),
    (_words(3, 20, n=9, seed=5), _grid(3, 20, seed=6, factor=3), _words(6, 20, n=14, seed=7), _grid(6, 20, seed=8)),
    (_words(2, 7, n=5, seed=9), -_grid(2, 7, seed=10).abs(), _words(2, 7, n=5, seed=11), _grid(2, 7, seed=12)),
    (_words(4, 9, n=6, seed=13), _grid(4, 9, seed=14, shift=-0.9), _words(3, 9, n=8, seed=15), _grid(3, 9, seed=16)),
    # words from a large vocabulary, windows of another length in V, and activations of a millionth
    (
        1 + 37 * _words(3, 9, n=6, seed=17),
        _grid(3, 9, seed=18) / 2**20,
        1 + 37 * _words(2, 14, n=9, seed=19),
        _grid(2, 14, seed=20) / 2**19,
    ),
]
SILENT = _words(2, 5, n=3, seed=21), _grid(2, 5, seed=22, factor=0), _words(1, 8, n=4, seed=23), _grid(1, 8, seed=24)


def _centres(n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten places whose windows, moved into a text of n tokens, do not overlap, and five random places."""
    generator = torch.Generator("cpu").manual_seed(seed)
    room = n // 10
    spread = torch.randint(room - width + 1, (10,), generator=generator) + width // 2 + room * torch.arange(10)
    spread[0], spread[-1] = width // 2 - 1, n - 1
    return spread[torch.randperm(10, generator=generator)], torch.randint(n, (5,), generator=generator)


SPLITS = [
    (*_centres(120, 6, seed=1), 6, 120),
    (*_centres(100, 8, seed=2), 8, 100),
    (torch.arange(5, 205, 20), torch.tensor([3, 44, 91, 131, 203]), 10, 210),
    (*_centres(131, 7, seed=3), 7, 131),
    (torch.tensor([30, 33, 31, 60, 62, 64, 0, 2, 88, 90]), torch.tensor([5, 34, 61, 76, 76]), 9, 91),  # overlaps
    (torch.tensor([6, 0, 3, 8, 1, 2, 5, 4, 9, 7]), torch.tensor([2, 2, 5, 0, 9]), 1, 10),
]


def _layer(
    h: int,
    k: int,
    w: int,
    seed: int,
    silent: tuple = (),
    flat: tuple = (),
    opposite: tuple = (),
    scale: float = 1,
    constant: tuple = (),
    negative: tuple = (),
    shift: float = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, simulations and presence (h, k, w).

    Some neurons are silent, and all in their first excerpt, or constant, or never positive; some simulations are always
    1, or say the opposite. Activations are shifted and then scaled.
    """
    a = random(h, k, w, seed=seed).clamp(min=0) * (1 + random(h, k, 1, seed=seed + 1).abs())
    s = (a / 2 + 0.6 * random(h, k, w, seed=seed + 2) + 0.3).clamp(min=0)
    s[list(opposite)] = s.max() - s[list(opposite)]
    a[:, : k > 1], a[list(silent)], s[list(flat)] = 0, 0, 1
    a = scale * (a + shift)
    a[list(constant)] = 0.75
    a[list(negative)] -= 20
    lengths = w - (4 * random(h, k, 1, seed=seed + 3).abs()).long().clamp(max=w // 2)
    present = torch.arange(w, device="cpu") < lengths
    return a * present, s * present, present


LAYERS = [
    _layer(6, 4, 10, seed=1, silent=(1,), flat=(4, 5)),
    _layer(4, 3, 8, seed=11, opposite=(2,)),
    _layer(5, 6, 12, seed=21, silent=(0, 3), opposite=(1,)),
    _layer(5, 2, 16, seed=31, flat=(2,)),
    _layer(4, 3, 9, seed=51, constant=(1,), negative=(2,), shift=-0.5),  # below 0, and a constant that is not 0
    _layer(3, 1, 20, seed=61, flat=(0,), scale=1e4),
]
TEXTS = [
    (random(90, seed=1), torch.arange(90, device="cpu") // 30, 8, 5),
    (random(64, seed=2), torch.arange(64, device="cpu") // 16, 6, 6),
    (random(80, seed=3) - 1.6, torch.arange(80, device="cpu") // 20, 6, 7),
    (random(70, seed=4), torch.tensor([0] * 12 + [1] * 40 + [2] * 18, device="cpu"), 10, 4),
]


_NEIGHBOURS = random(60, seed=5) - 3
_NEIGHBOURS[[20, 24, 28, 1, 0, 40, 59, 58, 50]] = torch.arange(9, 0, -1, dtype=torch.float64, device="cpu")
TEXTS.append((_NEIGHBOURS, torch.arange(60, device="cpu") // 30, 6, 5))  # overlaps in a row, and at both ends
# odd widths, documents numbered with gaps, tiny activations, and exact zeros, which are not positive
TEXTS.append((1e-12 * (random(50, seed=6) - 1).clamp(min=0), 2 + 3 * (torch.arange(50, device="cpu") // 25) ** 2, 5, 9))
_SIDE_BY_SIDE = torch.zeros(40, dtype=torch.float64, device="cpu")
_SIDE_BY_SIDE[[20, 27, 13, 33, 3, 39]] = torch.arange(6, 0, -1, dtype=torch.float64, device="cpu")
_PEAKS = random(200, seed=7) / 100  # hills with many strong tokens each, and the third lower than all of them
for _place, _height in ((40, 30.0), (100, 29.0), (160, 2.0)):
    _slope = 1 - (torch.arange(200, device="cpu") - _place).abs() / 28
    _PEAKS += _slope.clamp(min=0).sqrt() * _height
TEXTS.append((_PEAKS, torch.arange(200, device="cpu") // 200, 20, 3))
TEXTS.append((_SIDE_BY_SIDE, torch.tensor([0] * 7 + [1] * 26 + [2] * 7, device="cpu"), 7, 8))


def changes_of_the_score(function: Callable[[], dict[str, str]], reasons: bool = False) -> None:
    """Exercise 8.A: "up", "down", "same" or "undefined" for seven changes, against correlations before and after."""
    a, noise = (random(20, 400, seed=1) - 1).clamp(min=0).numpy(), random(20, 400, seed=2).clamp(min=0).numpy()
    s = a + 0.05 * np.arange(1, 21)[:, None] * noise
    each = np.array([_pearson(*pair) for pair in zip(a, s, strict=True)])
    surprise, alone = a[9].copy(), int(np.flatnonzero(s[9] == 0)[0])
    surprise[alone] = 10 * a[9].max()
    silence = np.zeros(400)
    weakest = np.isin(np.arange(20), each.argsort()[:2])
    changed = {
        "louder": (each[9], _pearson(3 * a[9], s[9]), "a correlation divides by the spread"),
        "offset": (each[9], _pearson(a[9], s[9] + 5), "a correlation subtracts the means"),
        "flat": (each[9], _pearson(a[9], np.ones(400)), "a constant does not vary with anything: 0/0"),
        "silence": (
            each[9],
            _pearson(np.append(a[9], silence), np.append(s[9], silence)),
            "both are below their means there, and so they agree: silence that is foretold counts as a success",
        ),
        "surprise": (
            each[9],
            _pearson(surprise, s[9]),
            "deviations enter squared, and one token can outweigh them all",
        ),
        "dropped": (each.mean(), each[~weakest].mean(), "the mean is now over others: those that were better anyway"),
        "zeroed": (
            each.mean(),
            np.where(weakest, 0, each).mean(),
            "two positive numbers become 0, of as many as before",
        ),
    }
    answer = predict(function, keys=changed, words=("up", "down", "same", "undefined"))
    wrong = dict.fromkeys(changed)
    for key, (before, after, reason) in changed.items():
        step = after - before
        measured = "undefined" if np.isnan(step) else "same" if abs(step) < 1e-9 else "up" if step > 0 else "down"
        if answer[key] != measured:
            wrong[key] = (
                f": you say {answer[key]!r}, measured: {measured!r} ({before:z.3f} before, {after:z.3f} after); "
                f"{reason}"
            )
    judge(function, wrong, reasons, {key: reason for key, (*_, reason) in changed.items()})
    print(f"{function.__name__}: right, all {len(changed)}, as measured on 20 neurons and 400 tokens.")


def simulate_by_table(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 8.B: simulations of the words of V from E, against counting for each word of V alone."""

    mistakes = {
        "M is taken over V: whoever simulates V has not seen it": partial(_table, scale=lambda E, V: V.clip(0).max()),
        "M is taken over E and V together: whoever simulates V has not seen it": partial(
            _table, scale=lambda E, V: max(E.max(), V.max(), 0)
        ),
        "each excerpt has an M of its own: it is the maximum over all of E": partial(
            _table, scale=lambda E, V: E.clip(0).max(1, keepdims=True)
        ),
        "M is the largest absolute value: negative activations count as 0": partial(
            _table, scale=lambda E, V: abs(E).max()
        ),
        "negative activations are kept: they count as 0": partial(_table, lowest=-np.inf),
        "M is negative where all of E is, and turns the signs round: the simulation is then 0 everywhere": _unguarded,
        "rounded to the nearest integer: it is rounded down": partial(_table, integer=np.round),
        "rounded up: it is rounded down": partial(_table, integer=np.ceil),
        "not rounded: the integers 0 to 10 are averaged": partial(_table, integer=lambda x: x),
        "averaged before rounding: each activation becomes an integer first": partial(
            _table, integer=lambda x: x, after=np.floor
        ),
        "the sum, not the mean: a word would be strong for being frequent": partial(_table, over=np.sum),
        "the largest, not the mean: places where a word leaves the neuron silent count": partial(_table, over=np.max),
        "the mean over places where the neuron fires: those where it is silent count": partial(
            _table, over=_mean_over_firing
        ),
        "each word has the value of its last place: a later entry overwrites an earlier one": partial(
            _table, over=lambda n: n[-1]
        ),
        "each word has the value of its first place: all places count": partial(_table, over=lambda n: n[0]),
        "the mean of each excerpt's mean: all places of a word count alike": _table_by_excerpt,
        "a word that is not in E gets the mean of the table: it gets 0": partial(
            _table, unseen=lambda table: np.mean(list(table.values()))
        ),
    }
    silent = also("where no activation of E is positive, the simulation is 0", SILENT, oracle=_counted_table)
    grade(function, TABLES, _counted_table, "counting for each word alone", mistakes, rules=[silent])


def _counted_table(words: Tensor, activations: Tensor, unread: Tensor, _: Tensor) -> np.ndarray:
    out, largest = np.zeros(unread.shape), activations.max()
    for place, word in np.ndenumerate(unread.numpy()):
        here = activations[words == word]
        if len(here) and largest > 0:  # the integer is how many of the tenths of M an activation reaches
            out[place] = sum((10 * here >= tenth * largest).sum() for tenth in range(1, 11)) / len(here)
    return out


def _table(
    words: Tensor,
    activations: Tensor,
    unread: Tensor,
    actual: Tensor,
    scale: Callable = lambda E, V: E.clip(0).max(),
    integer: Callable = np.floor,
    lowest: float = 0,
    over: Callable = np.mean,
    after: Callable = lambda mean: mean,
    unseen: Callable = lambda table: 0.0,
) -> np.ndarray:
    words, activations, unread, actual = (x.numpy() for x in (words, activations, unread, actual))
    M = scale(activations, actual)
    ratio = 10 * activations.clip(lowest) / np.where(M > 0, M, 1) * (M > 0)
    n = np.minimum(integer(ratio), 10)
    table = {word: after(over(n[words == word])) for word in np.unique(words)}
    return np.array([table.get(word, unseen(table)) for word in unread.flat]).reshape(unread.shape)


def _table_by_excerpt(words: Tensor, activations: Tensor, unread: Tensor, actual: Tensor) -> np.ndarray:
    """Means over excerpts of the means within each."""
    M = max(0.0, float(activations.max())) or 1e9
    n = np.floor(10 * activations.numpy().clip(0) / M)
    held = [{x: n[i][row == x].mean() for x in np.unique(row)} for i, row in enumerate(words.numpy())]
    known = {x: np.mean([table[x] for table in held if x in table]) for table in held for x in table}
    return np.array([known.get(x, 0.0) for x in unread.numpy().flat]).reshape(unread.shape)


def _unguarded(*case: Tensor) -> np.ndarray:
    """As it should be where E has a positive activation; elsewhere a negative one over a negative M is positive."""
    words, activations, unread, _ = (x.numpy() for x in case)
    n = np.floor(10 * activations / activations.max()).clip(0, 10)
    table = {word: n[words == word].mean() for word in np.unique(words)}
    return np.array([table.get(word, 0.0) for word in unread.flat]).reshape(unread.shape)


def _mean_over_firing(n: np.ndarray) -> float:
    return n[n > 0].mean() if (n > 0).any() else 0.0


SPLIT_BUGS = {
    "the five strongest explain and the next five validate: ranks alternate": {"halves": True},
    "V leaks: its random windows hold tokens that stand in E": {"leak": "never"},
    "a window at the beginning is lost, and one at the end cut short: they should be moved": {"ends": "lost"},
}


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 8.C: (top, random, width, n) that expose the bugs of a split."""
    needs = {"top": "10", "random": "5", "width": COUNT, "n": COUNT}
    hunt(inputs, _tried, SPLIT_BUGS, needs, _no_places, tell=tell)


def _no_places(top: Tensor, others: Tensor, width: int, n: int) -> str | None:
    if width > n:
        return f"a window of {width} tokens does not fit into a text of {n}"
    for name, places in (("top", top), ("random", others)):
        if places.is_floating_point() or not ((places >= 0) & (places < n)).all():
            return f"{name} are to be places in the text, whole numbers from 0 to {n - 1}"
    if len(top.unique()) < 10:
        return "the ten strongest places are ten different ones"
    return None


def mended_split(function: Callable[[Tensor, Tensor, int, int], Tensor], inputs: Callable[[], list[tuple]]) -> None:
    """Exercise 8.C, after the hunt: how often tokens are in E and V, against windows found by trying all places."""
    exposing(inputs, tell=False)
    mistakes = unmended(_tried, SPLIT_BUGS)
    mistakes |= {
        "windows are cut short at the ends of the text: they should be moved": partial(_tried, ends="cut"),
        "a window of odd width starts half a token too early or too late: ⌊width/2⌋ is rounded down": partial(
            _tried, half=lambda width: (width + 1) // 2
        ),
        "a token in two windows of E counts once: E is a list of windows, not a set of tokens": partial(
            _tried, once=(0,)
        ),
        "a whole window leaves V for a few tokens: take out these tokens and keep the rest": partial(
            _tried, leak="windows"
        ),
        "the tokens leave E instead of V: what has been read cannot be unread": partial(_tried, leak="from E"),
        "ranks 1, 3, 5, 7, 9 explain: it is the strongest that explains, and every other one after it": partial(
            _tried, exchanged=True
        ),
        "the random windows are missing from V": partial(_tried, no_random=True),
        "a token in two windows of V counts once: V is a list of windows, not a set of tokens": partial(
            _tried, once=(1,)
        ),
        "a token in two windows counts once: E and V are lists of windows, not sets of tokens": partial(
            _tried, once=(0, 1)
        ),
    }
    grade(function, SPLITS, _tried, "windows found by trying all places", mistakes)


def _tried(top: Tensor, others: Tensor, width: int, n: int, **bugs: object) -> np.ndarray:
    out = np.zeros((2, n))
    explains = [rank % 2 == 0 for rank in range(10)]
    if bugs.get("halves"):
        explains = [rank < 5 for rank in range(10)]
    if bugs.get("exchanged"):
        explains = [rank % 2 == 1 for rank in range(10)]
    E = [_window(c, width, n, **bugs) for c, yes in zip(top.tolist(), explains, strict=True) if yes]
    V = [_window(c, width, n, **bugs) for c, yes in zip(top.tolist(), explains, strict=True) if not yes]
    if not bugs.get("no_random"):
        V += [_window(c, width, n, **bugs) for c in others.tolist()]
    read = set().union(*E)
    checked = set().union(*V)
    for row, windows in enumerate((E, V)):
        for places in windows:
            for place in places:
                known = {
                    "tokens": row == 1 and place in read,
                    "windows": row == 1 and bool(read & places),
                    "from E": row == 0 and place in checked,
                    "never": False,
                }[bugs.get("leak", "tokens")]
                out[row, place] += not known
    for row in bugs.get("once", ()):
        out[row] = np.minimum(out[row], 1)
    return out


def _window(
    centre: int, width: int, n: int, ends: str = "moved", half: Callable = lambda width: width // 2, **_: object
) -> set[int]:
    wanted = centre - half(width)
    if ends == "moved":  # of all windows inside, the nearest
        start = min(range(n - width + 1), key=lambda start: abs(start - wanted))
        return set(range(start, start + width))
    if ends == "lost" and wanted < 0:
        return set(range(n)[wanted : wanted + width])
    return {place for place in range(wanted, wanted + width) if 0 <= place < n}


def layer_score(function: Callable[[Tensor, Tensor, Tensor], tuple[float, float, float]]) -> None:
    """Exercise 8.D: two means of a layer's scores and the share without one, against scipy neuron by neuron."""

    def oracle(*case: Tensor) -> tuple[float, float, float]:
        return _summary(_correlations(*case))

    mistakes = {
        "each excerpt is correlated on its own: string all tokens of V together and correlate once": partial(
            _each_excerpt, without=np.nan
        ),
        "each excerpt is correlated on its own, and a silent one counts as 0: string all tokens of V together": partial(
            _each_excerpt, without=0.0
        ),
        "places without text count: zeros that agree with zeros raise the score": _scored(whole=True),
        "one correlation for the whole layer: each neuron has its score, and the layer their mean": _strung,
        "the means are not subtracted: this is the cosine": _scored(of=_cosine),
        "these are rank correlations: Pearson's is of the activations": _scored(of=lambda x, y: spearmanr(x, y)[0]),
        "neurons without a score count as 0 in both means: the first leaves them out": _scored(
            then=lambda v: (np.nan_to_num(v).mean(), *_summary(v)[1:])
        ),
        "neurons without a score are left out of both means: in the second they count as 0": _scored(
            then=lambda v: (np.nanmean(v), np.nanmean(v), np.isnan(v).mean())
        ),
        "the two means are exchanged: first without the neurons that have no score": _scored(
            then=lambda v: (np.nan_to_num(v).mean(), np.nanmean(v), np.isnan(v).mean())
        ),
        "the third is a number of neurons: their share is asked for": _scored(
            then=lambda v: (*_summary(v)[:2], np.isnan(v).sum())
        ),
        "the third is the share with a score: the share without is asked for": _scored(
            then=lambda v: (*_summary(v)[:2], 1 - np.isnan(v).mean())
        ),
        "only silent neurons are taken for undefined: a constant simulation has no score either": _silent_only,
        "the absolute values are averaged: a simulation that says the opposite is wrong": _scored(
            then=lambda v: _summary(np.abs(v))
        ),
    }
    rules = [watching.never_calls(LAYERS[0], ("*.pearsonr", "*.corrcoef"), "write the correlation yourself")]
    for least in (1e-3, 1e-5, 1e-9):
        a, s, present = _layer(5, 3, 8, seed=71, silent=(2,))
        scale = torch.tensor([least, 1, 1, least, 1], dtype=torch.float64, device="cpu")[:, None, None]
        cases = [
            (scale * a, s, present),
            (a, scale * s, present),
            (a, (5 + scale.clamp(min=1e-5) * s) * present, present),
        ]
        but = f"what varies by {least:g} only is small, and not constant: a correlation does not know a scale"
        rules.append(also(but, *cases, oracle=oracle, rtol=1e-5))
    grade(function, LAYERS, oracle, "scipy, neuron by neuron", mistakes, rules=rules)
    name = function.__name__
    constants = torch.arange(1, 10, dtype=torch.float64, device="cpu")[:, None, None] / 10
    for what, constant in (("simulations", 1), ("activations", 0)):
        case = list(_layer(10, 7, 9, seed=41))
        case[constant][:9] = constants
        case[constant] *= case[2]
        share = float(ask(function, tuple(case), torch.zeros(3))[2])
        if not abs(share - 0.9) <= 1e-9:  # NaN is not right
            raise CheckFailed(
                f"{name} is right where a constant is 0 or 1, but of {what} that are 0.1, 0.2, … 0.9 "
                f"everywhere it takes {round(9 - 10 * share)} of 9 for varying: rounding leaves them a spread of "
                "1e-17. Compare the largest with the smallest value instead"
            )
    print("Constants such as 0.1, whose mean is rounded, are recognised too.")


def _correlations(a: Tensor, s: Tensor, present: Tensor, of: Callable | None = None, whole: bool = False) -> list:
    of = of or (lambda x, y: float(pearsonr(x, y)[0]))
    rows = zip(*(x.numpy() for x in (a, s, present | whole)), strict=True)
    return [of(x[p], y[p]) if np.ptp(x[p]) > 0 and np.ptp(y[p]) > 0 else np.nan for x, y, p in rows]


def _summary(values: list) -> tuple[float, float, float]:
    return np.nanmean(values), np.nan_to_num(values).mean(), np.isnan(values).mean()


def _each_excerpt(a: Tensor, s: Tensor, present: Tensor, without: float) -> tuple:
    """The mean of the excerpts' correlations; an undefined one is left out, or counts as `without`."""
    values = []
    for neuron in zip(a, s, present, strict=True):
        found = np.array(_correlations(*neuron))
        kept = found[~np.isnan(found)] if np.isnan(without) else np.nan_to_num(found, nan=without)
        values.append(np.nan if np.isnan(found).all() else kept.mean())
    return _summary(values)


def _scored(then: Callable = _summary, **how: object) -> Callable:
    return lambda a, s, present: then(_correlations(a, s, present, **how))


def _silent_only(a: Tensor, s: Tensor, present: Tensor) -> tuple:
    values = np.nan_to_num(_correlations(a, s, present))
    return _summary(np.where((a == 0).all(2).all(1).numpy(), np.nan, values))


def _strung(a: Tensor, s: Tensor, present: Tensor) -> tuple:
    rho = float(pearsonr(a[present], s[present])[0])
    return rho, rho, np.isnan(_correlations(a, s, present)).mean()


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt(x @ x * (y @ y)))


def strongest_windows(function: Callable[[Tensor, Tensor, int, int], Tensor]) -> None:
    """Exercise 8.E: starts of the k strongest windows, against removing places until none is left."""

    bugs = {
        "windows overlap: one excerpt would be shown many times": {"apart": "nothing"},
        "windows cross the ends of documents": {"ends": "cross"},
        "tokens count where the neuron is not positive": {"least": -np.inf},
    }
    mistakes = unmended(_chosen, bugs)
    mistakes |= {
        "places are kept apart instead of windows: two that were moved from the end of a document can overlap": partial(
            _chosen, apart="centres"
        ),
        "places half a window apart have windows that overlap: compare the windows": partial(_chosen, apart="half"),
        "only windows with one and the same start are left out: others overlap too": partial(_chosen, apart="same"),
        "one window a document: two that do not overlap may come from the same": partial(_chosen, apart="documents"),
        "a window that was refused bars others: only those that were kept do": partial(_chosen, blocks="all"),
        "the k strongest tokens are chosen first and overlaps removed then: others should move up": lambda *case: (
            _chosen(*case, first=case[3])
        ),
        "windows are moved at the beginning of a document only: at its end they cross": partial(
            _chosen, ends="beginning"
        ),
        "by place: the strongest comes first": partial(_chosen, order="place"),
        "tokens count where the neuron is exactly 0: walk as long as it is positive": partial(_chosen, zeros=True),
        "a window of odd width starts half a token too early: ⌊width/2⌋ is rounded down": partial(
            _chosen, half=lambda width: (width + 1) // 2
        ),
        "windows that stand side by side do not overlap: they share no token": partial(_chosen, apart="touching"),
    }
    grade(function, TEXTS, _removed, "removing places until none is left", mistakes)


def _removed(a: Tensor, document: Tensor, width: int, k: int) -> np.ndarray:
    """Every token's window by trial; then take the strongest token left, and all whose windows touch its own."""
    a, document = a.tolist(), document.tolist()
    whole = [s for s in range(len(a) - width + 1) if len(set(document[s : s + width])) == 1]
    reach = [
        min((s for s in whole if document[s] == own), key=lambda s, i=i: abs(s - (i - width // 2)))
        for i, own in enumerate(document)
    ]
    left, starts = {i for i in range(len(a)) if a[i] > 0}, []
    while left and len(starts) < k:
        best = max(left, key=a.__getitem__)
        starts.append(reach[best])
        left = {i for i in left if abs(reach[i] - reach[best]) >= width}
    return np.array(starts + [-1] * (k - len(starts)))


def _chosen(
    a: Tensor,
    document: Tensor,
    width: int,
    k: int,
    ends: str = "both",
    apart: str = "windows",
    blocks: str = "kept",
    first: int | None = None,
    least: float = 0,
    order: str = "strength",
    zeros: bool = False,
    half: Callable = lambda width: width // 2,
) -> np.ndarray:
    kept, seen, a, document = [], [], a.numpy(), document.numpy()
    for i in np.argsort(-a, kind="stable")[:first]:
        if a[i] < least or (a[i] == least and not zeros) or len(kept) == k:
            break
        own = np.flatnonzero(document == document[i]) if ends != "cross" else np.arange(len(a))
        start = max(i - half(width), own[0])
        if ends != "beginning":
            start = min(start, own[-1] + 1 - width)
        against = {"kept": kept, "all": seen}[blocks]
        clash = {
            "windows": any(abs(start - other) < width for other, _ in against),
            "centres": any(abs(i - other) < width for _, other in against),
            "half": any(abs(i - other) < width // 2 for _, other in against),
            "touching": any(abs(start - other) <= width for other, _ in against),
            "documents": any(document[i] == document[other] for _, other in against),
            "same": any(start == other for other, _ in against),
            "nothing": False,
        }[apart]
        seen.append((start, i))
        if not clash:
            kept.append((start, i))
    starts = [start for start, _ in kept]
    starts = sorted(starts) if order == "place" else starts
    return np.array(starts + [-1] * (k - len(starts)))


def _pearson(a: np.ndarray, s: np.ndarray) -> float:
    return float(pearsonr(a, s)[0]) if np.ptp(a) > 0 and np.ptp(s) > 0 else float("nan")
