"""TinyWorld's probabilities against enumeration, sampling and n-grams; its labels against what the text shows."""

from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest

from cratelab.corpora import tinyworld
from cratelab.corpora.tinyworld.grammar import Grammar
from cratelab.corpora.tinyworld.templates import Domain

# Two domains that share a title, words and a whole sentence beginning; facts told, told anew and recalled; a sense that
# is hidden until the sentence goes on. Small enough to write down every document of at most 17 tokens.
LAND = Domain(
    topics=("wet", "dry"),
    lists={"place": "bank sea hill", "name": "Ann Bob"},
    title="2 <begin> the $place .\n1 <begin> the end .",
    opening="1 $name=hero ran",
    body="2 @hero slept\n1 the $place fell\n1 then $name=hero ran",
    closing="3 so @hero <end>\n1 now @hero <end>",
)
TRADE = Domain(
    topics=("up", "down"),
    lists={"place": "bank fund", "name": "Ann Cid", "tone": "slow fast"},
    title="1 <begin> the $place .",
    opening="1 $name=head ran\n2 $name=head led",
    body="1 the bank#river fell\n2 the bank#money rose\n1 $tone",
    closing="1 so @head <end>",
)
SMALL = {"land": LAND, "trade": TRADE}
LENGTHS = (6, 2)
CONTEXT = 17


def enumerate_documents(domains: dict[str, Domain], context: int) -> dict[tuple[str, ...], float]:
    """Probability of every document, from the templates' text alone: each hidden choice in turn, no tree."""
    lines = lambda text: [line.split() for line in text.strip().splitlines()]  # noqa: E731
    size = lambda text: max(len(line) - 1 for line in lines(text))  # noqa: E731
    documents = defaultdict(float)
    for domain, topic, length in product(domains.values(), (0, 1), LENGTHS):
        closes = min(0.5, length / context)

        def fill(marks, words, facts, p, domain=domain, topic=topic):
            if not marks:
                yield words, facts, p
                return
            mark, *rest = marks
            if mark[0] == "@":
                yield from fill(rest, (*words, facts[mark[1:]]), facts, p)
            elif mark[0] == "$":
                name, _, fact = mark[1:].partition("=")
                choices = domain.lists[name].split()
                ranks = range(len(choices), 0, -1) if topic == 0 else range(1, len(choices) + 1)
                for word, rank in zip(choices, ranks, strict=True):
                    share = 1 / len(choices) if fact else rank / sum(ranks)
                    yield from fill(rest, (*words, word), {**facts, fact: word}, p * share)
            else:
                yield from fill(rest, (*words, mark.split("#")[0]), facts, p)

        def say(part, words, facts, p, domain=domain, fill=fill):
            options = lines(getattr(domain, part))
            total = sum(int(weight) for weight, *_ in options)
            for weight, *marks in options:
                yield from fill(marks, words, facts, p * int(weight) / total)

        room = size(domain.body) + size(domain.closing)
        todo = [
            state
            for title in say("title", (), {}, 1 / len(domains) / 2 / len(LENGTHS))
            for state in say("opening", *title)
        ]
        while todo:
            words, facts, p = todo.pop()
            ends = 1.0 if len(words) + room > context else closes
            for document, _, q in say("closing", words, facts, p * ends):
                documents[document] += q
            if ends < 1:
                todo += say("body", words, facts, p * (1 - ends))
    return documents


@pytest.fixture(scope="module")
def documents():
    return enumerate_documents(SMALL, CONTEXT)


def worst_error(grammar: Grammar, documents: dict[tuple[str, ...], float]) -> float:
    """Largest difference of log p between the grammar and the enumeration, over every token of every document."""
    prefixes = defaultdict(float)
    for document, p in documents.items():
        for i in range(len(document) + 1):
            prefixes[document[:i]] += p
    index = {word: i for i, word in enumerate(grammar.vocabulary)}
    worst = 0.0
    for document in documents:
        p = np.array([prefixes[document[:i]] for i in range(len(document) + 1)])
        log_prob = grammar.log_prob([index[word] for word in document], CONTEXT)
        worst = max(worst, np.abs(log_prob - np.log(p[1:] / p[:-1])).max())
    return worst


def test_the_probabilities_of_all_documents_sum_to_one(documents):
    assert len(documents) > 3000 and max(map(len, documents)) == CONTEXT
    grammar = Grammar(SMALL, LENGTHS)
    index = {word: i for i, word in enumerate(grammar.vocabulary)}
    total = sum(np.exp(grammar.log_prob([index[word] for word in document], CONTEXT).sum()) for document in documents)
    assert sum(documents.values()) == pytest.approx(1, abs=1e-12)
    assert total == pytest.approx(1, abs=1e-12)


def test_log_prob_is_that_of_the_enumeration(documents):
    assert worst_error(Grammar(SMALL, LENGTHS), documents) < 1e-12


def test_a_wrong_weight_shows(documents):
    wrong = {**vars(LAND), "body": LAND.body.replace("2 @hero", "3 @hero")}
    assert worst_error(Grammar({"land": Domain(**wrong), "trade": TRADE}, LENGTHS), documents) > 0.1


def test_enumeration_holds_hidden_choices(documents):
    """The sums are no formality: some prefixes leave the domain open, some the sense."""
    said = [document for document in documents if document[:4] == ("<begin>", "the", "bank", ".")]
    after = {document[4:6] for document in said}
    assert ("Ann", "ran") in after and ("Bob", "ran") in after and ("Cid", "led") in after
    both = [document[6:] for document in said if document[4:6] == ("Ann", "ran")]
    assert any("slept" in document for document in both) and any("slow" in document for document in both)
    assert any(document[:3] == ("the", "bank", "rose") for document in both)
    assert any(document[:3] == ("the", "bank", "fell") for document in both)


def small_sample(grammar: Grammar, n: int) -> Counter:
    random = np.random.default_rng(1)
    drafts = grammar.write(CONTEXT, iter(random.random, None))
    return Counter(tuple(grammar.vocabulary[word] for word in next(drafts).words) for _ in range(n))


def chi_square(counts: Counter, probabilities: dict, n: int) -> float:
    """Standard deviations of Pearson's statistic above its mean; rare outcomes are taken together."""
    common = {key for key, p in probabilities.items() if n * p >= 10}
    expected = np.array([n * probabilities[key] for key in common])
    observed = np.array([counts[key] for key in common])
    rest = n - expected.sum()
    if rest >= 10:
        expected, observed = np.append(expected, rest), np.append(observed, n - observed.sum())
    freedom = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_documents_are_written_as_often_as_enumerated(documents):
    n = 40_000
    counts = small_sample(Grammar(SMALL, LENGTHS), n)
    assert counts.keys() <= documents.keys()
    assert abs(chi_square(counts, documents, n)) < 4
    wrong = {**vars(TRADE), "opening": TRADE.opening.replace("2", "3")}
    assert chi_square(small_sample(Grammar({"land": LAND, "trade": Domain(**wrong)}, LENGTHS), n), documents, n) > 10


SHORT = 80  # a context with many more documents


@pytest.fixture(scope="module")
def world():
    return tinyworld.generate(400_000, seed=1)


@pytest.fixture(scope="module")
def words(world):
    return np.array(world.vocabulary)[world.tokens]


def column(world, name):
    return world.concepts[:, world.concept_names.index(name)]


def following(prefix, n_words: int, context: int) -> np.ndarray:
    """(v,) stated probabilities of the next token."""
    return np.exp([tinyworld.log_prob([*prefix, word], context)[-1] for word in range(n_words)])


def test_next_tokens_come_as_often_as_stated():
    """Monte Carlo: among documents with the same beginning, what follows, against the stated probabilities."""
    world = tinyworld.generate(400_000, seed=2, context=SHORT)
    starts = np.flatnonzero(np.diff(world.document, prepend=-1))
    begun = defaultdict(list)
    for start, end in zip(starts, [*starts[1:-1], starts[-1]], strict=False):
        for k in range(1, 14):
            if start + k < end:
                begun[tuple(world.tokens[start : start + k].tolist())].append(int(world.tokens[start + k]))
    common = [prefix for prefix, nexts in begun.items() if len(nexts) >= 60]
    assert len(common) > 50 and max(map(len, common)) > 8
    excess = []
    for prefix in common:
        stated = following(prefix, len(world.vocabulary), SHORT)
        assert stated.sum() == pytest.approx(1, abs=1e-12)
        counts = Counter(begun[prefix])
        assert all(stated[word] > 0 for word in counts)
        if (stated * len(begun[prefix]) >= 10).sum() > 1:
            excess.append(chi_square(counts, dict(enumerate(stated)), len(begun[prefix])))
    assert len(excess) > 30 and max(excess) < 6 and abs(np.mean(excess)) < 4 / np.sqrt(len(excess))


def test_the_stated_probabilities_sum_to_one_and_agree_with_the_text_deep_in_documents(world):
    """At random positions Σ p = 1, and −log p of what came is, on average, the entropy of what could have come."""
    random = np.random.default_rng(2)
    surprise, variance = [], []
    starts = np.flatnonzero(np.diff(world.document, prepend=-1))
    for position in random.integers(len(world.tokens), size=30):
        prefix = world.tokens[starts[world.document[position]] : position].tolist()
        p = following(prefix, len(world.vocabulary), 512)
        assert p.sum() == pytest.approx(1, abs=1e-9)
        assert np.log(p[world.tokens[position]]) == pytest.approx(world.log_prob[position], abs=1e-9)
        log_p = np.log(p[p > 0])
        entropy = -(p[p > 0] * log_p).sum()
        surprise.append(-world.log_prob[position] - entropy)
        variance.append((p[p > 0] * (log_p + entropy) ** 2).sum())
    assert abs(sum(surprise)) < 4 * np.sqrt(sum(variance))
