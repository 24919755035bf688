"""Wrong answers to the exercises of chapter 6: what a check says -> a function with that mistake."""

import itertools
import math

import torch
from torch.nn.functional import pad


def total(nats):
    return torch.cat(nats).sum()


def n_bytes(texts):
    return sum(len(text.encode()) for text in texts)


def by_document(nats, texts):
    return sum(x.sum() / len(text.encode()) for x, text in zip(nats, texts, strict=True)) / len(texts)


def bigram(add=None, below=None, train=lambda train, text: train, text=lambda train, text: text, back=False):
    """The bigram model with something wrong."""

    def function(train_documents, text_documents, v, alpha):
        learn, score = train(train_documents, text_documents), text(train_documents, text_documents)
        pairs = torch.cat([d[:-1] * v + d[1:] for d in learn])
        counts = pairs.bincount(minlength=v * v).view(v, v)
        counts = counts.T if back else counts
        smooth = alpha if add is None else add
        bottom = counts.sum(1, keepdim=True) + (smooth * v if below is None else below(alpha))
        q = (counts + smooth) / bottom
        if back:
            q = q.T
        return torch.cat([-q[d[:-1], d[1:]].log() for d in score]).mean()

    return function


def glued(documents):
    return [torch.cat(documents)]


def unigram(train, text, v, alpha):
    counts = torch.cat([d[1:] for d in train]).bincount(minlength=v) + alpha
    return -(counts / counts.sum()).log()[torch.cat([d[1:] for d in text])].mean()


def repeated_once(train, text, v, alpha, joined=False):
    """Adds to a table by index, which adds once where an index is repeated."""
    counts = torch.full((v, v), alpha)
    a, b = ([x[part] for x in train] for part in (slice(None, -1), slice(1, None)))
    if joined:
        a, b = [torch.cat(a)], [torch.cat(b)]
    for x, y in zip(a, b, strict=True):
        counts[x, y] += 1
    nats = -(counts / counts.sum(1, keepdim=True)).log()
    return torch.cat([nats[d[:-1], d[1:]] for d in text]).mean()


def averaged_by_document(train, text, v, alpha):
    return sum(bigram()(train, [d], v, alpha) for d in text) / len(text)


def over_all_tokens(train, text, v, alpha):
    n = sum(map(len, text))
    return bigram()(train, text, v, alpha) * (n - len(text)) / n


def in_place(train, text, v, alpha):
    answer = bigram()(train, text, v, alpha)
    train[0][0] = (train[0][0] + 1) % v
    return answer


def predicted(late=0, prior=True, log_weight=lambda log_given: log_given.cumsum(0)):
    """Weights of the authors, `late` tokens too late, times what they say."""

    def function(log_prior, log_given):
        start = log_prior if prior else 0 * log_prior
        before = start + pad(log_weight(log_given), (0, 0, 1, 0))
        weight = before[late : late + len(log_given)].log_softmax(1)
        return (weight + log_given).logsumexp(1)

    return function


def mean_of_logs(log_prior, log_given):
    weight = (log_prior + pad(log_given.cumsum(0), (0, 0, 1, 0)))[:-1].softmax(1)
    return (weight * log_given).sum(1)


def most_likely(log_prior, log_given):
    best = (log_prior + pad(log_given.cumsum(0), (0, 0, 1, 0)))[:-1].argmax(1)
    return log_given[torch.arange(len(best)), best]


def products(log_prior, log_given):
    joint = log_prior.exp() * pad(log_given.exp().cumprod(0), (0, 0, 1, 0), value=1.0)
    return (joint[1:].sum(1) / joint[:-1].sum(1)).log()


def infinities(log_prior, log_given):
    joint = log_prior + pad(log_given.cumsum(0), (0, 0, 1, 0))
    weight = (joint[:-1] - joint[:-1].amax(1, keepdim=True)).exp()
    weight = weight / weight.sum(1, keepdim=True)
    return (weight * log_given.exp()).sum(1).log() + 0 * joint[1:].sum(1)


def bpe(
    count_cut=True, merge_cut=True, once=False, tie=torch.argmax, keep=lambda match, since: since % 2 == 0, gone=None
):
    """A merge with something wrong."""

    def function(ids, word, v):
        pairs, within = ids[:-1] * v + ids[1:], word[:-1] == word[1:]
        counted = within if count_cut else torch.ones_like(within)
        if once:  # the first of equal words
            spelt = {int(w): tuple(ids[word == w].tolist()) for w in word.unique()}
            first = {symbols: w for w, symbols in reversed(spelt.items())}
            counted = counted & torch.tensor([first[spelt[int(w)]] == int(w) for w in word[:-1]])
        pair = tie(pairs[counted].bincount(minlength=v * v))
        match = (within if merge_cut else torch.ones_like(within)) & (pairs == pair)
        place = torch.arange(len(match))
        since = place - torch.where(match & ~pad(match[:-1], (1, 0)), place, 0).cummax(0).values
        left = match & keep(match, since)
        kept = ~pad(left if gone is None else gone(match, left), (1, 0))
        return torch.where(pad(left, (0, 1)), v, ids)[kept], word[kept]

    return function


def last(counts):
    return (counts == counts.max()).nonzero()[-1, 0]


def second_symbol_first(counts):
    v = math.isqrt(len(counts))
    a_of_b = counts.view(v, v).T.flatten().argmax()
    return a_of_b % v * v + a_of_b // v


def always(match, since):
    return torch.ones_like(match)


def alone(match, since):
    return ~pad(match[:-1], (1, 0)) & ~pad(match[1:], (0, 1))


def from_the_right(ids, word, v):
    pairs, within = ids[:-1] * v + ids[1:], word[:-1] == word[1:]
    match = within & (pairs == pairs[within].bincount().argmax())
    left = match.clone()
    for i in reversed(range(len(match) - 1)):
        left[i] &= ~left[i + 1]
    kept = ~pad(left, (1, 0))
    return torch.where(pad(left, (0, 1)), v, ids)[kept], word[kept]


def without_overlap(ids, word, v):
    """Counts pairs as str.count would."""
    counts, previous = torch.zeros(v * v), None
    for i in range(len(ids) - 1):
        pair = int(ids[i] * v + ids[i + 1])
        if word[i] == word[i + 1] and previous != (i - 1, pair):
            counts[pair] += 1
            previous = (i, pair)
    return bpe(tie=lambda _: counts.argmax())(ids, word, v)


def first_met(ids, word, v):
    pairs = (ids[:-1] * v + ids[1:])[word[:-1] == word[1:]]
    return bpe(tie=lambda counts: next(pair for pair in pairs if counts[pair] == counts.max()))(ids, word, v)


def in_place_merge(ids, word, v):
    answer = bpe()(ids, word, v)
    ids[0] = v
    return answer


def other_words(ids, word, v):
    symbols, _ = bpe()(ids, word, v)
    return symbols, word[: len(symbols)]


def pair_by_pair(train, text, v, alpha):
    counts = torch.full((v, v), alpha)
    for d in train:
        for a, b in itertools.pairwise(d.tolist()):
            counts[a, b] += 1
    nats = -(counts / counts.sum(1, keepdim=True)).log()
    return torch.tensor([nats[a, b] for d in text for a, b in itertools.pairwise(d.tolist())]).mean()


def token_by_token(log_prior, log_given):
    out, weight = [], log_prior
    for row in log_given:
        out.append((weight + row).logsumexp(0))
        weight = weight + row - out[-1]
    return torch.stack(out)


def author_by_author(log_prior, log_given):
    joint = [prior + pad(own.cumsum(0), (1, 0)) for prior, own in zip(log_prior, log_given.T, strict=True)]
    return torch.stack(joint).logsumexp(0).diff()


def symbol_by_symbol(ids, word, v):
    counts = {}
    for a, b, same in zip(ids[:-1].tolist(), ids[1:].tolist(), (word[:-1] == word[1:]).tolist(), strict=True):
        if same:
            counts[a, b] = counts.get((a, b), 0) + 1
    pair = min(counts, key=lambda pair: (-counts[pair], pair))
    symbols, words, i = [], [], 0
    while i < len(ids):
        here = i + 1 < len(ids) and word[i] == word[i + 1] and (int(ids[i]), int(ids[i + 1])) == pair
        symbols.append(v if here else int(ids[i]))
        words.append(int(word[i]))
        i += 1 + here
    return torch.tensor(symbols), torch.tensor(words)


def weights_that_underflow(log_prior, log_given):
    """Right but for a choice whose weight has become 0 before it is needed."""
    weight = (log_prior + pad(log_given.cumsum(0), (0, 0, 1, 0)))[:-1].softmax(1)
    return (weight * log_given.exp()).sum(1).log()


def across_words_as_zero(ids, word, v):
    """Numbers pairs across words 0, which is also the pair of two zeros."""
    counts = ((ids[:-1] * v + ids[1:]) * (word[:-1] == word[1:])).bincount(minlength=v * v)
    return bpe(tie=lambda _: counts.argmax())(ids, word, v)


def numbered_anew(ids, word, v):
    symbols, words = bpe()(ids, word, v)
    return symbols, words.unique_consecutive(return_inverse=True)[1]


def next_free(ids, word, v):
    return bpe()(ids, word, int(ids.max()) + 1)


WRONG = {
    "6.A": {
        "right elsewhere, but .*a document may be empty": lambda nats, texts: (
            total([x for x, text in zip(nats, texts, strict=True) if text]) / n_bytes(texts)
        ),
        "right elsewhere, but .*its end is paid for": lambda nats, texts: (
            total(nats) / sum(max(len(text.encode("utf8")), 1) for text in texts)
        ),
        "these are nats a token": lambda nats, texts: torch.cat(nats).mean(),
        "characters, not bytes": lambda nats, texts: total(nats) / sum(map(len, texts)),
        "each document has the same weight": by_document,
        "the end of a document is left out": lambda nats, texts: total([x[:-1] for x in nats]) / n_bytes(texts),
        "has no bytes of its own": lambda nats, texts: total(nats) / (n_bytes(texts) + len(texts)),
        "these are bits": lambda nats, texts: total(nats) / n_bytes(texts) / math.log(2),
        "divided by bytes a token": lambda nats, texts: torch.cat(nats).mean() * n_bytes(texts) / len(torch.cat(nats)),
        "turn it over": lambda nats, texts: n_bytes(texts) / total(nats),
        "UTF-16": lambda nats, texts: total(nats) / sum(len(text.encode("utf-16-le")) for text in texts),
        "white space at the ends": lambda nats, texts: total(nats) / n_bytes([text.strip() for text in texts]),
        "a text that occurs twice is paid for twice": lambda nats, texts: total(nats) / n_bytes(set(texts)),
        "in place": lambda nats, texts: total(nats) / n_bytes(texts.pop() for _ in list(texts)),
        "does it end in `return`": lambda nats, texts: None,
    },
    "6.B": {
        "scored on its training text": bigram(text=lambda train, text: train),
        "that is a leak": bigram(train=lambda train, text: [*train, *text]),
        "trained on the text to be scored": bigram(train=lambda train, text: text),
        "pairs are counted across documents": bigram(train=lambda train, text: glued(train)),
        "pairs are scored across documents": bigram(text=lambda train, text: glued(text)),
        "counted and scored across documents": bigram(
            train=lambda train, text: glued(train), text=lambda train, text: glued(text)
        ),
        "a pair that a document has several times": repeated_once,
        "a pair that comes several times": lambda *case: repeated_once(*case, joined=True),
        "the probabilities do not sum to 1": bigram(below=lambda alpha: alpha),
        "the probabilities sum to more than 1": bigram(below=lambda alpha: 1e-300),
        "is right, but loops over tokens": pair_by_pair,
        "not the words that training has seen": lambda train, text, v, alpha: bigram(
            below=lambda alpha: alpha * len(torch.cat([d[1:] for d in train]).unique())
        )(train, text, v, alpha),
        "the table is transposed": bigram(back=True),
        "this is a unigram model": unigram,
        "documents are averaged first": averaged_by_document,
        "divide by the number of tokens that are scored": over_all_tokens,
        "is not finite": bigram(add=0),
        "add alpha, not 1": bigram(add=1),
        "these are bits": lambda *case: bigram()(*case) / math.log(2),
        "the sign": lambda *case: -bigram()(*case),
        "in place": in_place,
        "does it end in `return`": lambda *case: None,
        "No common mistake": lambda train, text, v, alpha: bigram()(
            train, text, 1 + int(torch.cat([*train, *text]).max()), alpha
        ),
    },
    "6.C": {
        "a choice may be impossible from the start": lambda log_prior, log_given: predicted()(
            log_prior.clamp(min=-20), log_given
        ),
        r"returns the shape \(\).*a text may have one token": lambda *case: predicted()(*case).squeeze(),
        "there may be one choice": lambda log_prior, log_given: (
            predicted()(log_prior, log_given) * (len(log_prior) > 1)
        ),
        "stay those of the prior": predicted(log_weight=torch.zeros_like),
        "has a say in the weights": predicted(late=1),
        "the prior is missing: before": predicted(prior=False),
        "the prior is missing, and": predicted(prior=False, log_weight=torch.zeros_like),
        "the logarithm is averaged": mean_of_logs,
        "only the most likely choice": most_likely,
        "only the token before is used": predicted(log_weight=lambda log_given: log_given),
        "take differences": lambda *case: predicted()(*case).cumsum(0),
        "the sign": lambda *case: -predicted()(*case),
        "these are probabilities": lambda *case: predicted()(*case).exp(),
        "stay with logarithms": products,
        "rules out": infinities,
        "is right, but loops over tokens": token_by_token,
        "is right, but loops over authors": author_by_author,
        "the others' weights, divided by their sum, had become 0": weights_that_underflow,
    },
    "6.D": {
        "should become|belong to another": lambda ids, word, v: bpe()(ids, word % 1000, v),
        "counted and merged across words": bpe(count_cut=False, merge_cut=False),
        "pairs are counted across words": bpe(count_cut=False),
        "merged across words, too": bpe(merge_cut=False),
        "each word is counted once": bpe(once=True),
        "every place counts, so twice": without_overlap,
        "here it was the largest": bpe(tie=last),
        "the pair that is met first": first_met,
        "then the smallest second one": bpe(tie=second_symbol_first),
        "merges overlap": bpe(keep=always, gone=lambda match, left: match & ~pad(match[1:], (0, 1))),
        "all of aaa is one new symbol": bpe(keep=lambda match, since: since == 0, gone=lambda match, left: match),
        "merged from the right": from_the_right,
        "the second symbol of the pair is still there": bpe(gone=lambda match, left: torch.zeros_like(left)),
        "is not merged in longer runs": bpe(keep=alone),
        "belong to another word": other_words,
        "is right, but loops over symbols or words": symbol_by_symbol,
        "are said to belong to another word": numbered_anew,
        r"the words \[\[.* should become the symbols": across_words_as_zero,
        r"the words .* should become the symbols \[.*\b9\b.*and became": next_free,
        "in place": in_place_merge,
        "should return two tensors": lambda ids, word, v: bpe()(ids, word, v)[0],
        "No common mistake": lambda ids, word, v: (ids, word),
    },
}
