"""Checks of the exercises of chapter 6: nats a byte, a bigram model, a hidden choice, one merge of byte pairs."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, localcontext
from functools import partial
from itertools import pairwise
from math import fsum, log

import torch
from torch import Tensor

from cratelab.checks import watching
from cratelab.checks.grading import CheckFailed, also, as_tensor, call, grade, random

TEXTS = [
    ["Grüße aus 東京 😀", "plain", "naïve café"],
    ["語言模型", "a long line of ASCII, so that documents differ in length"],
    ["été", "0", "Ångström, 25 °C", "x² + y² = z²"],
    ["ein Dokument allein: ½"],
    ["  indented\n\n", "twice ü", "twice ü", "e\u0301 and é, \r\n"],  # white space, and a repetition
]


def nats_a_byte(function: Callable[[Sequence[Tensor], Sequence[str]], float]) -> None:
    """Exercise 6.A: the loss of documents by the byte, against a count by the rules of UTF-8."""

    def width(letter: str) -> int:
        """Bytes of a letter in UTF-8, from its number."""
        return 1 + sum(ord(letter) >= start for start in (0x80, 0x800, 0x10000))

    def size(text: str) -> int:
        return sum(map(width, text))

    def total(nats: Iterable[Tensor]) -> float:
        return fsum(x for document in nats for x in document.tolist())

    def by(unit: Callable[[str], float], nats: Sequence[Tensor], texts: Sequence[str]) -> float:
        return total(nats) / sum(map(unit, texts))

    def of_documents(nats: Sequence[Tensor], texts: Sequence[str]) -> float:
        each = [total([x]) / size(text) for x, text in zip(nats, texts, strict=True)]
        return fsum(each) / len(each)

    def n_tokens(nats: Sequence[Tensor]) -> int:
        return sum(map(len, nats))

    cases = []
    for seed, texts in enumerate(TEXTS):
        lengths = [2 + (3 * i + seed) % 5 for i in range(len(texts))]
        cases.append(([2 * random(n, seed=10 * seed + i).abs() for i, n in enumerate(lengths)], texts))
    mistakes = {
        "these are nats a token: divide by the bytes of the text": lambda nats, texts: total(nats) / n_tokens(nats),
        "these are characters, not bytes: ü has two bytes in UTF-8, 語 three": partial(by, len),
        "each document has the same weight: divide the sum of all nats by the sum of all bytes": of_documents,
        "the end of a document is left out: its token has no bytes, but the model pays for it": (
            lambda nats, texts: by(size, [x[:-1] for x in nats], texts)
        ),
        "the end of a document has no bytes of its own: count those of the text alone": partial(
            by, lambda text: size(text) + 1
        ),
        "these are bits: nats were asked for": lambda nats, texts: by(size, nats, texts) / log(2),
        "nats a token have to be divided by bytes a token, not multiplied": (
            lambda nats, texts: total(nats) / n_tokens(nats) ** 2 * sum(map(size, texts))
        ),
        "this is bytes a nat: turn it over": lambda nats, texts: 1 / by(size, nats, texts),
        "UTF-16 has other widths: count bytes of UTF-8": partial(by, lambda text: len(text.encode("utf-16-le"))),
        "white space at the ends of a document is text, too": partial(by, lambda text: size(text.strip())),
        "a text that occurs twice is paid for twice, so count its bytes twice": (
            lambda nats, texts: total(nats) / sum(map(size, set(texts)))
        ),
    }
    empty = ([random(n, seed=90 + n).abs() for n in (1, 3, 2, 1)], ["", "ab", "é", ""])
    ends = "a document may be empty, and its end is paid for all the same"
    rules = [also(ends, empty, oracle=partial(by, size))]
    grade(function, cases, partial(by, size), "a count by the rules of UTF-8", mistakes, rules=rules)


def bigram_loss(function: Callable[[Sequence[Tensor], Sequence[Tensor], int, float], float]) -> None:
    """Exercise 6.B: the loss of a smoothed bigram model on documents, against counts in a dictionary."""

    cases = [
        (_documents(6, (5, 9, 12), 1), _documents(6, (4, 8), 2), 8, 0.5),
        (_documents(4, (20, 7, 3, 9), 3), _documents(4, (6, 3, 11), 4), 5, 0.1),
        (_documents(9, (15, 30), 5), _documents(9, (12, 5, 2), 6), 12, 1.5),
        (_documents(3, (1, 6, 1, 4), 7), _documents(5, (5, 3), 8), 40, 0.02),  # documents of one token; unused words
    ]
    for case in cases:
        answer = call(function, *case, expected="a number")
        if isinstance(answer, (float, Tensor)) and not as_tensor(answer).isfinite().all():
            raise CheckFailed(
                f"{function.__name__} is not finite: a pair that was never seen in training has the probability 0 "
                "unless alpha is added to every count"
            )
    mistakes = {
        "the model is scored on its training text: that says how well it remembers": (
            lambda train, text, v, alpha: _bigram_loss(train, train, v, alpha)
        ),
        "the text to be scored is counted as well: that is a leak": (
            lambda train, text, v, alpha: _bigram_loss([*train, *text], text, v, alpha)
        ),
        "the model is trained on the text to be scored": lambda train, text, v, alpha: _bigram_loss(
            text, text, v, alpha
        ),
        "pairs are counted across documents: a document does not go on in the next one": (
            lambda train, text, v, alpha: _bigram_loss(_glued(train), text, v, alpha)
        ),
        "pairs are scored across documents: a document does not go on in the next one": (
            lambda train, text, v, alpha: _bigram_loss(train, _glued(text), v, alpha)
        ),
        "pairs are counted and scored across documents: a document does not go on in the next one": (
            lambda train, text, v, alpha: _bigram_loss(_glued(train), _glued(text), v, alpha)
        ),
        "the probabilities do not sum to 1: alpha is added to each of v counts, so alpha·v to their sum": (
            lambda train, text, v, alpha: _bigram_loss(train, text, v, alpha, bottom=alpha)
        ),
        "the probabilities sum to more than 1: alpha·v is missing in the denominator": (
            lambda train, text, v, alpha: _bigram_loss(train, text, v, alpha, bottom=1e-300)
        ),
        "v is the whole vocabulary, not the words that training has seen": _over_seen_words,
        "the table is transposed: the first token of a pair is known, the second is to be guessed": partial(
            _bigram_loss, back=True
        ),
        "the previous token is not used: this is a unigram model": partial(_bigram_loss, given=lambda a: 0),
        "documents are averaged first, so that a token of a short one counts more": _by_document,
        "divide by the number of tokens that are scored: the first of a document is not": _over_all_tokens,
        "these are bits: nats were asked for": lambda *case: _bigram_loss(*case) / log(2),
        "the sign: a loss is −log q": lambda *case: -_bigram_loss(*case),
        "a pair that a document has several times counts once: N[a, b] += 1 adds 1 for all of them; use bincount": (
            partial(_bigram_loss, counted=partial(_pairs, kind=set))
        ),
        "a pair that comes several times counts once: N[a, b] += 1 adds 1 for all of them; use bincount": (
            partial(_bigram_loss, counted=lambda documents: set(_pairs(documents)))
        ),
        "add alpha, not 1": lambda train, text, v, alpha: _bigram_loss(train, text, v, 1.0),
    }
    short, long = ((_documents(7, (n, n), 9), _documents(7, (n,), 10), 7, 0.5) for n in (20, 80))
    rules = [watching.no_loop(short, long, "tokens")]
    grade(function, cases, _bigram_loss, "counts in a dictionary", mistakes, rules=rules)


def _pairs(documents: Iterable[Tensor], kind: type = list) -> list[tuple[int, int]]:
    return [pair for d in documents for pair in kind(pairwise(d.tolist()))]


def _glued(documents: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(documents))]


def _bigram(
    train: Sequence[Tensor],
    v: int,
    alpha: float,
    bottom: float | None = None,
    back: bool = False,
    given: Callable = lambda a: a,
    counted: Callable = _pairs,
) -> Callable[[tuple[int, int]], float]:
    """The loss of a pair; smoothing adds `bottom` to the denominator, and `given` makes a context of a token."""
    seen = [pair[::-1] if back else pair for pair in counted(train)]
    both = Counter((given(a), b) for a, b in seen)
    left = Counter(given(a) for a, _ in seen)

    def loss(pair: tuple[int, int]) -> float:
        a, b = pair[::-1] if back else pair
        return -log((both[given(a), b] + alpha) / (left[given(a)] + (alpha * v if bottom is None else bottom)))

    return loss


def _bigram_loss(train: Sequence[Tensor], text: Sequence[Tensor], v: int, alpha: float, **changed: object) -> float:
    loss = _bigram(train, v, alpha, **changed)
    losses = [loss(pair) for pair in _pairs(text)]
    return fsum(losses) / len(losses)


def _by_document(train: Sequence[Tensor], text: Sequence[Tensor], v: int, alpha: float) -> float:
    return fsum(_bigram_loss(train, [d], v, alpha) for d in text) / len(text)


def _over_all_tokens(train: Sequence[Tensor], text: Sequence[Tensor], v: int, alpha: float) -> float:
    return _bigram_loss(train, text, v, alpha) * len(_pairs(text)) / sum(map(len, text))


def _over_seen_words(train: Sequence[Tensor], text: Sequence[Tensor], v: int, alpha: float) -> float:
    return _bigram_loss(train, text, len({b for _, b in _pairs(train)}), alpha)


def next_log_prob(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 6.C: log p of each token with a hidden choice summed out, against decimals of 60 digits."""

    cases = []
    for seed, (n, k) in enumerate([(6, 3), (9, 2), (5, 7)], start=1):
        cases.append((random(k, seed=seed).log_softmax(0), -1.5 * random(n, k, seed=seed + 10).abs()))
    mistakes = {
        "the weights of the choices stay those of the prior: after each token, Bayes' rule changes them": partial(
            _weighed, fixed=True
        ),
        "the token to be guessed has a say in the weights: use those before it": partial(_weighed, late=1),
        "the prior is missing: before the first token the choices are not equally likely": partial(
            _weighed, prior=False
        ),
        "the prior is missing, and the weights never change": partial(_weighed, prior=False, fixed=True),
        "the logarithm is averaged: average the probabilities, then take the logarithm": (
            lambda log_prior, log_given: (_weights(log_prior, log_given) * log_given).sum(1)
        ),
        "only the most likely choice is used: the others are still open": _most_likely,
        "only the token before is used: the weights remember all of them": _last_token_only,
        "this is the probability of the text so far: take differences": lambda *case: _exact(*case).cumsum(0),
        "the sign: these are nats, log p was asked for": lambda *case: -_exact(*case),
        "these are probabilities: log p was asked for": lambda *case: _exact(*case).exp(),
    }
    few, tokens, authors = (
        (random(k, seed=21).log_softmax(0), -random(m, k, seed=22).abs()) for m, k in ((10, 3), (40, 3), (10, 12))
    )
    ruled_out = cases[0][1].clone()
    ruled_out[1, 0] = ruled_out[3, 2] = -torch.inf
    n = 4000
    hard = {
        "a choice that a token rules out has log p = −∞ and the weight 0, and no nan may come of it": (
            cases[0][0],
            ruled_out,
        ),
        f"the product of {n} probabilities is smaller than any number a computer has: stay with logarithms, "
        "and add with torch.logsumexp": (cases[1][0], -1.5 * random(n, 2, seed=7).abs()),
        f"after {n // 2} tokens a choice can be ruled out beside which the others' weights, divided by their sum, had "
        "become 0: they are needed now, so keep the logarithms of the weights": (cases[0][0], _overtaken(n)),
    }
    impossible = torch.tensor([-torch.inf, log(0.5), log(0.5)], dtype=torch.float64, device="cpu")
    fond = -random(30, 3, seed=23).abs() - torch.tensor([0.0, 3, 3], device="cpu")  # the text is like that choice's
    hard["a choice may be impossible from the start, and stays so"] = (impossible, fond)
    hard["a text may have one token"] = (cases[0][0], cases[0][1][:1])
    hard["there may be one choice, and then nothing is hidden"] = (0 * cases[0][0][:1], cases[0][1][:, :1])
    rules = [also(but, case, oracle=_exact, rtol=1e-6, atol=1e-8) for but, case in hard.items()]
    rules += [watching.no_loop(few, tokens, "tokens"), watching.no_loop(few, authors, "authors")]
    grade(function, cases, _exact, "sums of products with 60 digits", mistakes, rules=rules)


def _overtaken(n: int) -> Tensor:
    """(n, 3) log p given each choice; the first, by far the likeliest, is ruled out half-way, then the third."""
    log_given = -1.5 * random(n, 3, seed=8).abs()
    log_given[: n // 2, 1:] -= 1.0
    log_given[n // 2, 0] = log_given[n // 2 + 7, 2] = -torch.inf
    return log_given


def _exact(log_prior: Tensor, log_given: Tensor) -> Tensor:
    """The probability of each prefix is a sum of products, and a token's is the ratio of two of them."""
    with localcontext() as context:
        context.prec = 60
        paths = [Decimal(x).exp() for x in log_prior.tolist()]
        mass, out = sum(paths), []
        for row in log_given.tolist():
            paths = [path * Decimal(x).exp() for path, x in zip(paths, row, strict=True)]
            before, mass = mass, sum(paths)
            out.append(float((mass / before).ln()))
    return torch.tensor(out, dtype=torch.float64, device="cpu")


def _weights(log_prior: Tensor, log_given: Tensor, late: int = 0) -> Tensor:
    """(n, k) weights of the choices, after i + late tokens."""
    n, k = log_given.shape
    log_weight = torch.cat([torch.zeros(1, k, dtype=torch.float64, device="cpu"), log_given.cumsum(0)])
    return (log_prior + log_weight)[late : n + late].softmax(1)


def _weighed(log_prior: Tensor, log_given: Tensor, late: int = 0, prior: bool = True, fixed: bool = False) -> Tensor:
    start = log_prior if prior else torch.zeros_like(log_prior)
    weight = start.softmax(0).expand_as(log_given) if fixed else _weights(start, log_given, late)
    return (weight * log_given.exp()).sum(1).log()


def _most_likely(log_prior: Tensor, log_given: Tensor) -> Tensor:
    chosen = _weights(log_prior, log_given).argmax(1, keepdim=True)
    return log_given.gather(1, chosen)[:, 0]


def _last_token_only(log_prior: Tensor, log_given: Tensor) -> Tensor:
    log_weight = log_prior + torch.cat([torch.zeros_like(log_given[:1]), log_given[:-1]])
    return (log_weight.softmax(1) * log_given.exp()).sum(1).log()


def bpe_step(function: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Exercise 6.D: one merge in a stream of (n,) symbols that are cut into words, against lists, word by word."""
    name = function.__name__

    mistakes = {
        "pairs are counted and merged across words: a pair needs two symbols of one word": {"cut": (False, False)},
        "pairs are counted across words: a pair needs two symbols of one word": {"cut": (False, True)},
        "the pair is merged across words, too: where one word ends and the next begins, nothing is merged": {
            "cut": (True, False)
        },
        "each word is counted once: a word that occurs n times counts n times": {"count": "types"},
        "in aaa the pair aa is counted once; every place counts, so twice": {"count": "no overlap"},
        "ties: of equally frequent pairs the one of the smallest symbols wins, here it was the largest": {"tie": max},
        "ties: the smallest first symbol decides, then the smallest second one": {
            "tie": lambda pairs: min(pairs, key=lambda pair: pair[::-1])
        },
        "ties: the pair that is met first wins here; the one of the smallest symbols should": {
            "tie": lambda pairs: next(iter(pairs))
        },
        "merges overlap: in aaa the middle a goes to the first pair and is gone for the second": {"merge": "overlap"},
        "all of aaa is one new symbol: a merge joins two symbols, left to right": {"merge": "swallow"},
        "merged from the right: aaa becomes (aa)a, not a(aa)": {"merge": "right"},
        "the second symbol of the pair is still there": {"merge": "keep second"},
        "a pair of two equal symbols is not merged in longer runs, such as aaa": {"merge": "no runs"},
    }
    cases = [(*_stream(words), v) for words, v in _WORDS]
    cases += [(ids, 1000 * word * word - 7, v) for ids, word, v in cases]  # words may be numbered with gaps
    answers = []
    for ids, word, v in cases:
        answer = call(function, ids, word, v, expected="the symbols and their words")
        try:
            symbols, belongs = answer
            answer = torch.as_tensor(symbols).cpu(), torch.as_tensor(belongs).cpu()
        except Exception:  # whatever a library says of what is no two lists of numbers
            raise CheckFailed(f"{name} should return two tensors, the symbols and their words") from None
        if answer[0].shape != answer[1].shape or answer[0].ndim != 1:
            raise CheckFailed(
                f"{name} returns the shapes {tuple(answer[0].shape)} and {tuple(answer[1].shape)}: each symbol that is "
                "left belongs to one word"
            )
        answers.append(answer)
    expected = [_bpe_step(*case) for case in cases]
    got = [answer[0].tolist() for answer in answers]
    if got != expected:
        for message, changed in mistakes.items():
            if got == [_bpe_step(*case, **changed) for case in cases]:
                raise CheckFailed(f"{name}: {message}")
        i = next(i for i in range(len(cases)) if got[i] != expected[i])
        raise CheckFailed(
            f"{name}: the words {_words(*cases[i][:2])} should become the symbols {expected[i]}, and became {got[i]}. "
            "No common mistake explains it"
        )
    for (_, word, v), (left, belongs) in zip(cases, answers, strict=True):
        # a new symbol stands for two, so its word is that of two symbols of before
        wide = [label for symbol, label in zip(left, belongs, strict=True) for _ in range(1 + int(symbol == v))]
        if [float(label) for label in wide] != word.tolist():
            raise CheckFailed(f"{name}: the symbols are right, but some are said to belong to another word")
    words = [[0, 1, 1], [1, 0], [1, 1, 1, 0], [0, 1, 1]]
    short, long = ((*_stream(text), 2) for text in (words, [*words, [1] * 20, *words, *words]))
    watching.no_loop(short, long, "symbols or words")(function)
    print(f"{name}: right. It agrees with lists, merged word by word, in {len(cases)} texts.")


def _bpe_step(
    ids: Tensor,
    word: Tensor,
    v: int,
    cut: tuple[bool, bool] = (True, True),
    count: str = "places",
    tie: Callable = min,
    merge: str = "left",
) -> list[int]:
    """The symbols after one merge; `cut` says if words are cut when pairs are counted and when they are merged."""
    counted = _words(ids, word if cut[0] else torch.zeros_like(word))
    pairs = Counter()
    for symbols in {tuple(w): w for w in counted}.values() if count == "types" else counted:
        previous = None
        for i, pair in enumerate(pairwise(symbols)):
            overlaps = previous == (i - 1, pair)
            if count != "no overlap" or not overlaps:
                pairs[pair] += 1
                previous = (i, pair)
    most = max(pairs.values())
    pair = tie(pair for pair, n in pairs.items() if n == most)
    return [x for w in _words(ids, word if cut[1] else torch.zeros_like(word)) for x in _merged(w, pair, v, merge)]


# One idea each: words and their ends, counts of words, runs of one symbol, ties.
_WORDS = [
    ([[1, 2], [1, 2], [3, 1], [3, 1], [3, 0, 1]], 4),  # 2·3 and 1·3 stand across words
    ([[0, 1], [2, 3], [0, 1, 2], [3, 0, 1], [3, 2], [3, 2], [3, 2, 3, 2], [1, 0]], 4),
    ([[2, 0], [2, 0], [2, 0], [2, 0], [3, 1], [1, 3, 4], [4, 3, 1], [1, 3]], 5),
    ([[1, 1, 1], [0, 2], [0, 2], [1, 1, 1, 1], [2, 1, 1], [0, 2], [1], [1, 1]], 3),
    ([[0, 0, 0, 0, 0], [0, 0, 1], [1, 0, 0, 0], [0], [0, 0]], 2),
    ([[0, 0, 0], [1, 2], [1, 2]], 3),  # a tie by places only
    ([[3, 1], [0, 3], [3, 1], [0, 3], [2, 0], [2, 0], [1, 1]], 4),
    ([[2, 2, 2], [3, 0], [3, 0, 1]], 4),
    ([[3, 2], [3, 2], [4, 1], [4, 1]], 5),
    ([[1], [0], [1, 2], [2], [1], [1, 2], [0], [2]], 9),  # most neighbours are of two words; symbols not in use
    ([[0, 0]], 1),
]


def _documents(v: int, lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Documents of words that are not equally frequent."""
    return [(random(n, seed=100 * seed + i).abs() / 2.5 * v).long().clamp(max=v - 1) for i, n in enumerate(lengths)]


def _stream(words: list[list[int]]) -> tuple[Tensor, Tensor]:
    symbols, word = zip(*[(symbol, i) for i, symbols in enumerate(words) for symbol in symbols], strict=True)
    return torch.tensor(symbols, device="cpu"), torch.tensor(word, device="cpu")


def _words(ids: Tensor, word: Tensor) -> list[list[int]]:
    """The symbols of each word."""
    out: dict[int, list[int]] = {}
    for symbol, of in zip(ids.tolist(), word.tolist(), strict=True):
        out.setdefault(of, []).append(symbol)
    return list(out.values())


def _merged(symbols: list[int], pair: tuple[int, int], new: int, how: str) -> list[int]:
    """The symbols of a word with the pair merged, rightly from the left."""
    if how == "right":
        return _merged(symbols[::-1], pair[::-1], new, "left")[::-1]
    places = [i for i in range(len(symbols) - 1) if (symbols[i], symbols[i + 1]) == pair]
    begins = places  # where a new symbol stands
    if how in ("left", "keep second"):
        begins = []
        for i in places:
            if not begins or i > begins[-1] + 1:
                begins.append(i)
    elif how == "no runs":
        begins = [i for i in places if i - 1 not in places and i + 1 not in places]
    elif how == "swallow":
        begins = [i for i in places if i - 1 not in places]
    gone = {i + 1 for i in (begins if how in ("left", "no runs") else places)}
    if how == "keep second":
        gone = set()
    elif how == "overlap":
        gone -= set(places)
    return [new if i in begins else symbol for i, symbol in enumerate(symbols) if i not in gone]
